import pytest
import torch
from lightning.pytorch import LightningModule
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from doors import as_it_is, assert_sharp

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True, scope="module")
def geometric():
    for name in ("torch_geometric.data", "torch_geometric.data.lightning", "torch_geometric.loader"):
        pytest.importorskip(name)
    return pytest.importorskip("torch_geometric")


def test_graph_classification(geometric, tmp_path):
    """Batches of graphs, BatchNorm, dropout, a metric updated in the step and logged as an object."""

    class GIN(LightningModule):
        def __init__(self):
            super().__init__()
            self.gnn = geometric.nn.GIN(5, 8, 2, dropout=0.5, norm="batch_norm")
            self.classifier = geometric.nn.MLP([8, 8, 3], norm="batch_norm", dropout=0.5)
            self.accuracy = MulticlassAccuracy(3)

        def training_step(self, data, batch_idx):
            x = geometric.nn.global_add_pool(self.gnn(data.x, data.edge_index), data.batch)
            scores = self.classifier(x)
            self.accuracy(scores.softmax(dim=-1), data.y)
            self.log("train_acc", self.accuracy, on_step=False, on_epoch=True, batch_size=data.num_graphs)
            return cross_entropy(scores, data.y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def task(made_from=as_it_is):
        return made_from(GIN)()

    def graphs():
        rows = [
            geometric.data.Data(x=torch.rand(4, 5), edge_index=torch.randint(4, (2, 6)), y=torch.tensor(i % 3))
            for i in range(24)
        ]
        return {"train_dataloaders": geometric.loader.DataLoader(rows, batch_size=6, shuffle=True)}

    assert_sharp(task, graphs, tmp_path)

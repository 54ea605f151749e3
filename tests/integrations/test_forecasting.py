import numpy as np
import pandas as pd
import pytest

from doors import as_it_is, assert_sharp

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True, scope="module")
def forecasting():
    return pytest.importorskip("pytorch_forecasting")


def test_temporal_fusion_transformer(forecasting, tmp_path):
    """Batches of (dictionary, (target, weight)), metrics of the library, its own plateau scheduler and its own logs."""
    table = pd.DataFrame(
        {
            "time": np.tile(np.arange(20), 2),
            "series": np.repeat(["a", "b"], 20),
            "value": np.random.default_rng(0).normal(size=40),
        }
    )
    series = forecasting.TimeSeriesDataSet(
        table,
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=6,
        max_prediction_length=2,
        time_varying_known_reals=["time"],
        time_varying_unknown_reals=["value"],
        static_categoricals=["series"],
    )

    def task(made_from=as_it_is):
        cls = made_from(forecasting.TemporalFusionTransformer)
        return cls.from_dataset(
            series,
            hidden_size=4,
            attention_head_size=1,
            hidden_continuous_size=4,
            dropout=0.3,
            learning_rate=1e-2,
            optimizer="adam",
            reduce_on_plateau_patience=0,
        )

    def windows():
        return {
            "train_dataloaders": series.to_dataloader(train=True, batch_size=8),
            "val_dataloaders": series.to_dataloader(train=False, batch_size=8),
        }

    assert_sharp(task, windows, tmp_path)

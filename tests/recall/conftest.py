import pytest

from tests.recall.models import save_chat_model


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("chat"))

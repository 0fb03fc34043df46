"""Components: what a trainer declares is whole, and its key can stand in a file name."""

import pytest

from ckptcoord.core.sharing import (
    ComponentSpec,
    SharingPattern,
    StateComponent,
    Stateful,
    ValidationLevel,
    check_component_key,
)
from ckptcoord.errors import ConfigError, InvalidNameError


def component(key="model", pattern=SharingPattern.REPLICATED, **rest):
    return StateComponent(key=key, stateful={}, sharing_pattern=pattern, **rest)


@pytest.mark.parametrize("key", ["model", "rng", "a", "A_1", "0", "lr-scheduler", "x" * 64, "_"])
def test_plain_words_are_keys(key):
    assert component(key).key == key


@pytest.mark.parametrize(
    "key",
    [
        *("", "-x", "a.b", "a/b", "..", "a b", "é", "a\n", "a\0", "x" * 65, "a@b", 7, None),
        *("model-00001-of-00002", "m-000001-of-123456"),
    ],
)
def test_what_cannot_stand_in_a_file_name_is_no_key(key):
    with pytest.raises(InvalidNameError, match="component key"):
        component(key)
    with pytest.raises(InvalidNameError):
        check_component_key(key)


@pytest.mark.parametrize("pattern", list(SharingPattern))
@pytest.mark.parametrize("group", [None, "tp"])
def test_a_group_is_named_with_per_group_and_only_there(pattern, group):
    if (pattern is SharingPattern.PER_GROUP) == (group is not None):
        assert component(pattern=pattern, process_group_name=group).process_group_name == group
        return
    with pytest.raises(ConfigError) as caught:
        component(pattern=pattern, process_group_name=group)
    assert "process_group_name" in caught.value.field
    assert pattern.name in caught.value.why


def test_the_defaults_are_those_of_the_docs():
    one = component()
    assert one.required is True
    assert one.validate_replication is False
    assert one.validation_level is ValidationLevel.TENSOR
    assert (one.get_state, one.set_state, dict(one.metadata)) == (None, None, {})


def test_two_components_do_not_share_their_metadata():
    assert component().metadata is not component().metadata


def test_a_spec_is_the_component_without_its_state():
    one = component("opt", SharingPattern.PER_GROUP, process_group_name="tp")
    assert one.spec == ComponentSpec(key="opt", pattern=SharingPattern.PER_GROUP, group_name="tp")
    assert sorted([component("b").spec, component("a").spec])[0].key == "a"


def test_stateful_is_whatever_has_both_methods():
    class Both:
        def state_dict(self):
            return {}

        def load_state_dict(self, state_dict):
            pass

    assert isinstance(Both(), Stateful)
    assert not isinstance({}, Stateful)


@pytest.mark.parametrize("kind", [SharingPattern, ValidationLevel])
def test_the_words_on_disk_are_the_lower_case_names(kind):
    for member in kind:
        assert member.value == member.name.lower()
        assert kind(member.value) is member


def test_a_pattern_and_a_level_may_be_given_by_their_values():
    component = StateComponent("x", {}, "replicated", validation_level="full")
    assert component.sharing_pattern is SharingPattern.REPLICATED
    assert component.validation_level is ValidationLevel.FULL
    with pytest.raises(ConfigError, match=r"sharing_pattern: is 'shared'.*global, per_rank"):
        StateComponent("x", {}, "shared")

//! The commands that work in each state: the model against public sources.

mod common;
#[path = "../examples/states/table/mod.rs"]
mod table;

use soft_amd_sp::Command;
use std::sync::LazyLock;
use table::Comparison;

/// The model is asked once; it takes seconds.
static COMPARISON: LazyLock<Comparison> = LazyLock::new(Comparison::new);

#[test]
fn the_documented_page_is_what_the_model_prints() {
    let page = include_str!("../docs/states.md");
    assert_eq!(
        COMPARISON.page(),
        page,
        "run: cargo run --example states > docs/states.md"
    );
}

#[test]
fn every_difference_between_model_and_reference_is_explained() {
    let unexplained = COMPARISON.unexplained();
    assert!(unexplained.is_empty(), "{unexplained:#?}");
    assert_eq!(
        COMPARISON.idle(),
        [0; 0],
        "explanations of what does not differ"
    );
}

#[test]
fn every_command_of_the_model_is_compared() {
    let tried: Vec<Command> = COMPARISON.commands().collect();
    for command in Command::ALL {
        assert!(tried.contains(command), "{command}");
    }
}

#[path = "../examples/layouts/page.rs"]
mod layouts;

#[test]
fn the_documented_layouts_are_those_of_the_model() {
    let page = include_str!("../docs/layouts.md");
    assert_eq!(
        layouts::page(),
        page,
        "run: cargo run --example layouts > docs/layouts.md"
    );
}

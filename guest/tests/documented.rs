//! docs/hostile-host.md names tests; they exist.

use std::path::Path;

#[test]
fn every_test_that_the_document_names_exists() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let document = here.join("../docs/hostile-host.md");
    let text = std::fs::read_to_string(document).expect("the document");
    let mut named = 0;
    for (file, test) in text.split('`').filter_map(|part| part.split_once("::")) {
        let source = here.join("tests").join(file).with_extension("rs");
        let source = std::fs::read_to_string(&source).unwrap_or_else(|e| panic!("{file}: {e}"));
        assert!(
            source.contains(&format!("fn {test}(")),
            "{file} has no {test}"
        );
        named += 1;
    }
    assert!(named > 50, "{named} only");
}

#[test]
fn every_attack_is_documented() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(here.join("../docs/hostile-host.md")).expect("the document");
    for file in ["tdx_hostile", "tdx_memory", "sev_hostile"] {
        let source = here.join("tests").join(file).with_extension("rs");
        let source = std::fs::read_to_string(source).expect("a test");
        let tests = source
            .split("#[test]")
            .skip(1)
            .filter_map(|part| part.split_once("fn ")?.1.split_once('('));
        for (test, _) in tests {
            assert!(
                text.contains(&format!("`{file}::{test}`")),
                "{file}::{test}"
            );
        }
    }
}

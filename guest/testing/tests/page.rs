//! docs/guest-testing.md shows tests that are compiled and run.

use kvm_ops_guest_test::tdx::TestTd;
use std::path::Path;

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn the_page_shows_the_tests_of_this_folder() {
    let page = read("../../docs/guest-testing.md");
    for file in ["first_tdx.rs", "own_tdcall.rs", "first_snp.rs"] {
        let test = read(&format!("tests/{file}"));
        assert!(
            page.contains(&format!("```rust,ignore\n{test}```\n")),
            "{file}"
        );
    }
}

#[test]
fn the_first_tests_have_thirty_lines_at_most() {
    for file in ["first_tdx.rs", "first_snp.rs"] {
        let lines = read(&format!("tests/{file}")).lines().count();
        assert!(lines <= 30, "{file} has {lines} lines");
    }
}

#[test]
fn the_page_shows_the_message_of_the_first_mistake() {
    let td = TestTd::builder().pending(0x8000..0xa000).build();
    let forgotten = td.expect("a td").run(|cpu| cpu.write(0x8010, b"mine"));
    let fault = forgotten.expect("the code ends").expect_err("a mistake");
    let page = read("../../docs/guest-testing.md");
    assert!(page.contains(&format!("```text\n{fault}\n```")), "{fault}");
}

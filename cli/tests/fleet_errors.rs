//! Tests that every fault of a fleet file is reported with its line, and that nothing runs.

mod common;

use common::{run, run_with_input};

/// A fleet file, the place of its fault (line:column), and the texts that must be printed.
const FAULTS: &[(&str, &str, &[&str])] = &[
    ("", "", &["the fleet has no VMs", "hint: add one"]),
    ("# nothing\n", "", &["the fleet has no VMs"]),
    ("vm = []\n", "", &["the fleet has no VMs"]),
    ("[[vm]\nname = 1\n", "1:6", &["this is not TOML", "[[vm]"]),
    (
        "[[vm]]\nname = \"a\nx",
        "2:",
        &["this is not TOML", "name = \"a"],
    ),
    ("a = 1\na = 2\n", "2:1", &["this is not TOML", "duplicate"]),
    (
        "vm = 3\n",
        "1:6",
        &["must be an array of tables", "this is an integer", "[[vm]]"],
    ),
    (
        "[vm]\nname = \"a\"\n",
        "1:1",
        &["must be an array of tables", "write [[vm]]"],
    ),
    (
        "defaults = 1\n[[vm]]\nname = \"a\"\npayload = \"hello\"\n",
        "1:12",
        &["must be a table"],
    ),
    (
        "[default]\nvcpus = 1\n[[vm]]\nname = \"a\"\npayload = \"hello\"\n",
        "1:2",
        &["unknown key `default`", "did you mean `defaults`?"],
    ),
    (
        "[[vm]]\nname = \"a\"\npaylaod = \"hello\"\n",
        "3:1",
        &[
            "unknown key `paylaod` in [[vm]]",
            "paylaod = \"hello\"",
            "did you mean `payload`?",
        ],
    ),
    (
        "[[vm]]\nname = \"a\"\npayload = \"hello\"\nqqq = 1\n",
        "4:1",
        &["unknown key `qqq`", "has the keys `name`"],
    ),
    (
        "[[vm]]\nname = \"a\"\npayload = \"helo\"\n",
        "3:11",
        &["did you mean `hello`?"],
    ),
    ("[[vm]]\npayload = \"hello\"\n", "1:1", &["without a name"]),
    (
        "[[vm]]\nname = 5\npayload = \"hello\"\n",
        "2:8",
        &["`name` must be a string", "an integer"],
    ),
    (
        "[[vm]]\nname = \"\"\npayload = \"hello\"\n",
        "2:8",
        &["`name` is not acceptable"],
    ),
    (
        "[[vm]]\nname = \"a b\"\npayload = \"hello\"\n",
        "2:8",
        &["letters, digits"],
    ),
    (
        "[[vm]]\nname = \"a\"\n",
        "1:1",
        &["nothing to run", "hello, sieve, crc32, mmio, pair, spin"],
    ),
    (
        "[[vm]]\nname = \"a\"\npayload = \"hello\"\nimage = \"x\"\n",
        "4:9",
        &["runs one thing"],
    ),
    (
        "[[vm]]\nname = \"a\"\npayload = \"hello\"\nvcpus = 0\n",
        "4:9",
        &["must be 1 to 4096"],
    ),
    (
        "[[vm]]\nname = \"a\"\npayload = \"hello\"\nvcpus = 4097\n",
        "4:9",
        &["must be 1 to 4096"],
    ),
    (
        "[[vm]]\nname = \"a\"\npayload = \"hello\"\nvcpus = 2\n",
        "4:9",
        &["must be 1, or left out"],
    ),
    (
        "[[vm]]\nname = \"a\"\npayload = \"hello\"\nvcpus = \"2\"\n",
        "4:9",
        &["must be an integer"],
    ),
    (
        "[[vm]]\nname = \"a\"\npayload = \"hello\"\ncount = 0\n",
        "4:9",
        &["must be 1 to 4096"],
    ),
    (
        "[[vm]]\nname = \"a\"\npayload = \"hello\"\ncount = -1\n",
        "4:9",
        &["must be 1 to 4096"],
    ),
    (
        "[[vm]]\nname = \"a\"\npayload = \"hello\"\nmemory = 5000\n",
        "4:10",
        &["5000 bytes are not a multiple of the page size"],
    ),
    (
        "[[vm]]\nname = \"a\"\npayload = \"hello\"\nmemory = \"1Q\"\n",
        "4:10",
        &["is not a size"],
    ),
    (
        "[[vm]]\nname = \"a\"\npayload = \"hello\"\nmemory = 0\n",
        "4:10",
        &["needs memory"],
    ),
    (
        "[[vm]]\nname = \"a\"\npayload = \"hello\"\nmemory = \"4K\"\n",
        "4:10",
        &["128K or more"],
    ),
    (
        "[[vm]]\nname = \"a\"\npayload = \"hello\"\ntimeout = \"5\"\n",
        "4:11",
        &["is not a time"],
    ),
    (
        "[[vm]]\nname = \"a\"\npayload = \"hello\"\nkind = \"sev-spn\"\n",
        "4:8",
        &["unknown kind `sev-spn`", "did you mean `sev-snp`?"],
    ),
    (
        "[[vm]]\nname = \"a\"\npayload = \"hello\"\nhost = \"vmware\"\n",
        "4:8",
        &["unknown host", "`auto`, `kvm` and `sim`"],
    ),
    (
        "[[vm]]\nname = \"a\"\npayload = \"hello\"\noptional = 1\n",
        "4:12",
        &["true or false"],
    ),
    (
        "[[vm]]\nname = \"a\"\npayload = \"hello\"\ncmdline = \"x\"\n",
        "4:11",
        &["goes with an image"],
    ),
    (
        "[[vm]]\nname = \"a\"\npayload = \"hello\"\nirqchip = \"full\"\n",
        "4:11",
        &["goes with an image"],
    ),
    (
        "[[vm]]\nname = \"a\"\npayload = \"hello\"\n[[vm]]\nname = \"a\"\npayload = \"hello\"\n",
        "5:8",
        &["two VMs of the name `a`", "used here", "used again"],
    ),
    (
        "[[vm]]\nname = \"a\"\ncount = 2\npayload = \"hello\"\n[[vm]]\nname = \"a-1\"\npayload = \"hello\"\n",
        "6:8",
        &["two VMs of the name `a-1`"],
    ),
    (
        "[[vm]]\nname = \"a\"\nimage = \"/nonexistent/image\"\n",
        "3:9",
        &["cannot use image /nonexistent/image", "No such file"],
    ),
    (
        "[[vm]]\nname = \"a\"\nimage = \"/\"\n",
        "3:9",
        &["not a regular file"],
    ),
    (
        "[[vm]]\nname = \"a\"\npayload = \"hello\"\nexpect = { end = \"stop\" }\n",
        "4:18",
        &["unknown end `stop`"],
    ),
    (
        "[[vm]]\nname = \"a\"\npayload = \"hello\"\nexpect = { consol = \"x\" }\n",
        "4:12",
        &["did you mean `console`?"],
    ),
    (
        "[[vm]]\nname = \"a\"\npayload = \"hello\"\nexpect = { result = 4294967296 }\n",
        "4:21",
        &["out of range"],
    ),
];

#[test]
fn each_fault_is_told_with_its_line_and_column() {
    for (fleet, place, said) in FAULTS {
        let ran = run_with_input(&["fleet", "-"], fleet);
        // A file that is not there is none of the fleet file's mistakes.
        let code = if ran.err.starts_with("error: cannot use") {
            5
        } else {
            2
        };
        assert_eq!(ran.code, Some(code), "{fleet:?}: {}", ran.err);
        assert_eq!(ran.out, "", "{fleet:?}");
        let mut said = said.to_vec();
        let arrow = format!("--> standard input:{place}");
        said.extend(["error: ", "no VM was started"]);
        if !place.is_empty() {
            said.push(&arrow);
        }
        for words in said {
            assert!(
                ran.err.contains(words),
                "{fleet:?} lacks {words:?}: {}",
                ran.err
            );
        }
    }
}

#[test]
fn all_faults_of_a_file_are_told_at_once_in_its_order() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(
        file.path(),
        "[[vm]]\nname = \"a\"\nvcpus = 0\npayload = \"x\"\n\n[[vm]]\nnam = \"b\"\npayload = 1\n",
    )
    .unwrap();
    let path = file.path().to_str().unwrap();
    let ran = run(&["fleet", path]);
    assert_eq!(ran.code, Some(2));
    let places: Vec<_> = ran
        .err
        .lines()
        .filter(|line| line.contains("--> "))
        .collect();
    let wanted = ["3:9", "4:11", "6:1", "7:1", "8:11"];
    assert_eq!(places.len(), wanted.len(), "{}", ran.err);
    for (place, wanted) in places.iter().zip(wanted) {
        assert!(
            place.ends_with(&format!("{path}:{wanted}")),
            "{place} {wanted}"
        );
    }
    assert!(
        ran.err.contains("5 errors; no VM was started"),
        "{}",
        ran.err
    );
}

#[test]
fn a_kind_that_no_host_has_is_refused_at_its_line_and_starts_nothing() {
    // The library holds none of these on /dev/kvm.
    for kind in ["tdx", "sev", "sev-es", "sev-snp"] {
        let fleet = format!(
            "[[vm]]\nname = \"good\"\npayload = \"hello\"\n\
             [[vm]]\nname = \"bad\"\nkind = \"{kind}\"\npayload = \"hello\"\nhost = \"kvm\"\n"
        );
        let ran = run_with_input(&["fleet", "-", "--host", "sim"], &fleet);
        assert_eq!(ran.code, Some(6), "{kind}: {}", ran.err);
        assert_eq!(ran.out, "");
        for words in [
            "standard input:6:8",
            kind,
            "caused by: ",
            "hint: ",
            "no VM was started",
        ] {
            assert!(ran.err.contains(words), "{kind} lacks {words}: {}", ran.err);
        }
    }
}

#[test]
fn the_image_of_an_snp_guest_without_metadata_is_refused_at_its_line() {
    let image = tempfile::NamedTempFile::new().unwrap();
    // The smallest ROM that is recognised: the jump of a reset vector, and no tables.
    let mut rom = vec![0; 0x1_0000];
    rom[0xfff0..0xfff3].copy_from_slice(&[0xe9, 0x0d, 0xf0]);
    std::fs::write(image.path(), rom).unwrap();
    let fleet = format!(
        "[[vm]]\nname = \"a\"\nkind = \"sev-snp\"\nimage = \"{}\"\n",
        image.path().display()
    );
    let ran = run_with_input(&["fleet", "-", "--host", "sim"], &fleet);
    assert_eq!(ran.code, Some(5), "{}", ran.err);
    for words in [
        "standard input:2:8",
        "the image has no table of GUIDed entries",
        "hint: ",
    ] {
        assert!(ran.err.contains(words), "{words}: {}", ran.err);
    }
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let binary = directory.path().join("binary.toml");
    std::fs::write(&binary, [0xff, 0xfe, 0]).unwrap();
    let large = directory.path().join("large.toml");
    std::fs::write(&large, vec![b'#'; (1 << 20) + 1]).unwrap();
    for (path, why) in [
        ("/nonexistent/fleet.toml", "No such file"),
        (directory.path().to_str().unwrap(), "not a regular file"),
        (binary.to_str().unwrap(), "utf-8"),
        (large.to_str().unwrap(), "more than the 0x100000"),
    ] {
        let ran = run(&["fleet", path]);
        assert_eq!(ran.code, Some(5), "{path}");
        for words in ["error: the fleet file", path, why] {
            assert!(ran.err.contains(words), "{words}: {}", ran.err);
        }
    }
}

#[test]
fn more_vms_than_a_fleet_can_have_are_refused() {
    let fleet: String = (0..2)
        .map(|i| format!("[[vm]]\nname = \"n{i}\"\ncount = 4096\npayload = \"hello\"\n"))
        .collect();
    let ran = run_with_input(&["fleet", "-"], &fleet);
    assert_eq!(ran.code, Some(2));
    assert!(ran.err.contains("8192 VMs are too many"), "{}", ran.err);
}

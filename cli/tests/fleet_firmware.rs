//! Fleets of VMs that boot firmware at once, and their books.
//!
//! The firmware of TDs is `OVMF.inteltdx.ms.fd` of Debian's package ovmf-inteltdx (2026.08), or the file that the environment
//! variable `KVM_OPS_TDVF` names; that of AMD's VMs is `OVMF.amdsev.fd` of ovmf-amdsev (2026.08), or the file that
//! `KVM_OPS_OVMF_SEV` names. `KVM_OPS_FLEET` is the number of TDs, 8 by default, and at most the 31 that find keys.

mod common;

use common::{NOTHING_TO_BOOT, PROMPT, ovmf_sev, run_with_input, tdvf};
use serde_json::Value;

const MEMORY: u64 = 96 << 20;

fn tds() -> u64 {
    let stated = std::env::var("KVM_OPS_FLEET").ok();
    stated.map_or(8, |count| count.parse().expect("a number of TDs"))
}

#[test]
fn tds_boot_firmware_side_by_side_and_give_everything_back() {
    let Some(firmware) = tdvf() else {
        return;
    };
    let count = tds();
    let file = format!(
        "[[vm]]\nname = \"td\"\ncount = {count}\nkind = \"tdx\"\nhost = \"sim\"\nimage = {firmware:?}\n\
         memory = {MEMORY}\ntimeout = \"30m\"\nexpect = {{ end = \"console\", console = {PROMPT:?} }}\n"
    );
    let ran = run_with_input(&["fleet", "--json", "-"], &file);
    let report: Value = serde_json::from_str(&ran.out).unwrap_or_else(|_| panic!("{}", ran.err));
    assert_eq!(ran.code, Some(0), "{report}");
    let totals = &report["totals"];
    assert_eq!(
        (&totals["vms"], &totals["ok"]),
        (&count.into(), &count.into())
    );
    assert_eq!(totals["leaks"], 0);
    assert_eq!(report["before"], report["after"]);
    let [account] = report["firmware"].as_array().unwrap().as_slice() else {
        panic!("one firmware: {report}");
    };
    let number = |of: &str, key: &str| account[of][key].as_u64().unwrap();
    for (of, taken) in [("pages", "taken"), ("keys", "leased")] {
        assert_eq!(number(of, taken), number(of, "freed"), "{account}");
        assert_eq!(
            (number(of, "leaked"), number(of, "out")),
            (0, 0),
            "{account}"
        );
    }
    assert_eq!(number("keys", "leased"), count);
    assert_eq!(account["disagreements"].as_array().map(Vec::len), Some(0));
    // Each TD has one vCPU and does the same.
    let vms = report["vms"].as_array().unwrap();
    let instructions = vms[0]["instructions"].as_u64().unwrap();
    assert!(instructions > 100_000_000, "{report}");
    for vm in vms {
        assert_eq!(vm["measurement"], vms[0]["measurement"]);
    }
    let peak = report["peak_memory"].as_u64().unwrap();
    println!(
        "{count} TDs of {} MiB: {} instructions, {} pages of the module's taken and freed, {} MiB of RAM at most, {:.1} s",
        MEMORY >> 20,
        totals["instructions"],
        number("pages", "taken"),
        peak >> 20,
        report["seconds"].as_f64().unwrap(),
    );
}

#[test]
fn ovmf_finds_a_q35_in_every_kind_of_vm_of_amds_side_by_side() {
    let Some(firmware) = ovmf_sev() else {
        return;
    };
    let kinds = ["svm", "sev", "sev-es", "sev-snp"];
    let mut file =
        String::from("[defaults]\nhost = \"sim\"\nmemory = \"96M\"\ntimeout = \"30m\"\n");
    for kind in kinds {
        file += &format!(
            "[[vm]]\nname = \"{kind}\"\nkind = \"{kind}\"\nimage = {firmware:?}\n\
             expect = {{ end = \"console\", console = {NOTHING_TO_BOOT:?} }}\n"
        );
    }
    let ran = run_with_input(&["fleet", "--json", "-"], &file);
    let report: Value = serde_json::from_str(&ran.out).unwrap_or_else(|_| panic!("{}", ran.err));
    assert_eq!(ran.code, Some(0), "{report}");
    let totals = &report["totals"];
    assert_eq!(
        (&totals["ok"], &totals["leaks"]),
        (&kinds.len().into(), &0.into())
    );
}

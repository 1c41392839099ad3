//! Tests the answers of `doctor`.

mod common;

use common::run;
use serde_json::Value;

fn diagnosis() -> Value {
    let ran = run(&["doctor", "--json"]);
    assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""));
    serde_json::from_str(&ran.out).expect("JSON")
}

fn technology<'a>(diagnosis: &'a Value, name: &str) -> &'a Value {
    diagnosis["technologies"]
        .as_array()
        .expect("an array")
        .iter()
        .find(|technology| technology["name"] == name)
        .expect("every technology is named")
}

#[test]
fn every_technology_has_an_answer_for_each_place_with_a_reason_where_it_is_no() {
    let diagnosis = diagnosis();
    for name in ["vmx", "tdx", "svm", "sev", "sev-es", "sev-snp"] {
        let technology = technology(&diagnosis, name);
        for place in ["host", "kvm", "software"] {
            let offer = &technology[place];
            let offered = offer["offered"].as_bool().expect("yes or no");
            let reasons = offer["why_not"].as_array().expect("an array").len();
            assert_eq!(offered, reasons == 0, "{name} {place}: {offer}");
        }
    }
}

#[test]
fn the_device_is_usable_exactly_if_it_can_be_opened_and_answers_version_12() {
    let diagnosis = diagnosis();
    let device = &diagnosis["dev_kvm"];
    let usable = device["usable"].as_bool().unwrap();
    match kvm_ioctls::Kvm::new() {
        Ok(kvm) => {
            assert_eq!(usable, kvm.get_api_version() == 12);
            // Ask the kernel again, without the program's code.
            for (name, vm_type) in [("sev", 2), ("sev-es", 3), ("sev-snp", 4), ("tdx", 5)] {
                let offered = technology(&diagnosis, name)["host"]["offered"] == true;
                assert_eq!(offered, kvm.create_vm_with_type(vm_type).is_ok(), "{name}");
            }
            let normal = ["vmx", "svm"]
                .iter()
                .any(|name| technology(&diagnosis, name)["host"]["offered"] == true);
            assert_eq!(normal, kvm.create_vm().is_ok());
            let vcpus = diagnosis["capabilities"]
                .as_array()
                .unwrap()
                .iter()
                .find(|capability| capability["name"] == "KVM_CAP_MAX_VCPUS")
                .expect("the capability is shown");
            assert_eq!(vcpus["answer"], kvm.get_max_vcpus());
        }
        Err(_) => {
            assert!(!usable);
            assert!(
                device["error"].is_string() && device["hint"].is_string(),
                "{device}"
            );
            assert!(
                diagnosis["technologies"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .all(|technology| technology["kvm"]["offered"] == false)
            );
        }
    }
}

#[test]
fn the_software_platform_offers_every_technology() {
    let diagnosis = diagnosis();
    for name in ["vmx", "tdx", "svm", "sev", "sev-es", "sev-snp"] {
        let offer = &technology(&diagnosis, name)["software"];
        assert_eq!(offer["offered"], true, "{name}: {offer}");
    }
}

#[test]
fn the_table_says_what_the_json_says() {
    let text = run(&["doctor"]).out;
    let diagnosis = diagnosis();
    for technology in diagnosis["technologies"].as_array().unwrap() {
        let name = technology["name"].as_str().unwrap();
        let line = text
            .lines()
            .find(|line| line.split_whitespace().next() == Some(name))
            .unwrap_or_else(|| panic!("no line for {name}: {text}"));
        for place in ["host", "kvm", "software"] {
            if let Some(summary) = technology[place]["summary"].as_str() {
                assert!(line.contains(summary), "{line} lacks {summary}");
            }
        }
    }
    for capability in diagnosis["capabilities"].as_array().unwrap() {
        let name = capability["name"]
            .as_str()
            .unwrap()
            .trim_start_matches("KVM_CAP_");
        assert!(text.contains(name), "{name}");
    }
}

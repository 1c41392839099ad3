//! Numbers and names against the software TDX module, which has them from elsewhere.

use std::collections::BTreeMap;

use kvm_ops_tdx::Leaf;
use kvm_ops_tdx::status::{CLASS_MASK, Class, CompletionStatus, operand};
use soft_tdx_module::{Code, HostLeaf, Operand};

#[test]
fn leaves_have_the_numbers_names_and_versions_of_the_abi() {
    for leaf in Leaf::ALL {
        let theirs = HostLeaf::from_number(*leaf as u16).expect("a leaf of the module");
        assert_eq!(leaf.name(), theirs.name());
        assert!(leaf.version() == 0 || HostLeaf::is_versioned(*leaf as u16));
        assert_eq!(
            leaf.rax(),
            theirs.number() | u64::from(leaf.version()) << 16
        );
    }
}

#[test]
fn status_classes_are_those_of_the_abi_and_details_do_not_matter() {
    for class in Class::ALL {
        for detail in [0, 1, 128, u32::MAX] {
            let status = class.with(detail);
            let theirs = soft_tdx_module::Status(status.get());
            assert_eq!(theirs.code().name(), class.name());
            assert_eq!(CompletionStatus::new(status.get()).class(), *class);
            assert_eq!(status.get() & CLASS_MASK, class.with(0).get());
            assert_eq!(status.is_error(), theirs.is_error());
            assert_eq!(status.detail(), detail);
        }
    }
    assert_eq!(
        Class::ALL.len(),
        Class::ALL.iter().filter_map(|c| c.name()).count()
    );
    let busy = Code::OPERAND_BUSY.on(Operand::TDR);
    assert_eq!(Class::OPERAND_BUSY.with(operand::TDR).get(), busy.0);
}

/// The back end and the software module have their tables from the manuals, each for itself.
#[test]
fn both_tables_of_statuses_have_the_same_numbers_and_names() {
    let ours: BTreeMap<u64, &str> = Class::NAMED
        .iter()
        .map(|(class, name)| (class.with(0).get(), *name))
        .collect();
    assert_eq!(ours.len(), Class::NAMED.len(), "no number stands twice");
    let theirs: BTreeMap<u64, String> = Code::ALL
        .iter()
        .map(|code| (code.status().0, code.status().to_string()))
        .collect();
    // The software module blames RAX where no operand is given.
    let bare = |text: &String| text.split('|').next().expect("a name").to_owned();
    assert_eq!(
        ours.iter()
            .map(|(n, name)| (*n, (*name).to_owned()))
            .collect::<Vec<_>>(),
        theirs
            .iter()
            .map(|(n, text)| (*n, bare(text)))
            .collect::<Vec<_>>()
    );
}

#[test]
fn every_word_has_the_name_and_the_operand_that_the_software_module_gives_it() {
    let fatal = 1 << 61;
    for (class, name) in Class::NAMED {
        for detail in (1..=200).chain([u32::MAX]) {
            for word in [class.with(detail).get(), class.with(detail).get() | fatal] {
                let (ours, theirs) = (CompletionStatus::new(word), soft_tdx_module::Status(word));
                assert_eq!(
                    ours.operand(),
                    theirs.operand().and_then(Operand::name),
                    "{theirs:?}"
                );
                assert!(ours.to_string().starts_with(name), "{ours}");
            }
        }
    }
    let unknown = CompletionStatus::new(0xdead_beef_0000_0001);
    assert_eq!(unknown.to_string(), "0xdeadbeef00000001");
    let leaf = Class::OPERAND_INVALID.with(0);
    assert_eq!(leaf.operand(), Some("RAX"));
    assert_eq!(Class::EPT_WALK_FAILED.with(0).operand(), None);
}

#[test]
fn operands_have_the_numbers_of_the_abi() {
    for (ours, theirs) in [
        (operand::RCX, Operand::RCX),
        (operand::RDX, Operand::RDX),
        (operand::R8, Operand::R8),
        (operand::R9, Operand::R9),
        (operand::TDR, Operand::TDR),
        (operand::SEPT_TREE, Operand::SEPT_TREE),
        (operand::TD_EPOCH, Operand::TD_EPOCH),
        (operand::OP_STATE, Operand::OP_STATE),
        (operand::KOT, Operand::KOT),
        (operand::KET, Operand::KET),
        (operand::WBCACHE, Operand::WBCACHE),
    ] {
        assert_eq!(ours, theirs.0);
    }
}

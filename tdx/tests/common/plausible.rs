//! The plausible failures of each leaf.

use kvm_ops_core::{Error, Field};
use kvm_ops_tdx::Leaf;
use kvm_ops_tdx::status::{Class, operand};

use super::Injected;

/// An injected failure.
#[derive(Clone, Copy)]
pub struct Failure {
    class: Option<Class>,
    how: &'static str,
    pub answer: Injected,
    pub times: u64,
}

pub const FOR_EVER: u64 = u64::MAX;

impl Failure {
    pub fn name(&self) -> String {
        let class = self.class.and_then(Class::name).unwrap_or_default();
        format!("{class}{}", self.how)
    }

    /// Set for a status that says that the call was done, which it was not.
    pub fn is_lie(&self) -> bool {
        self.how.ends_with("wrongly")
    }
}

/// The ways in which a leaf can fail: first those of every leaf.
pub fn failures(leaf: Leaf) -> Vec<Failure> {
    use Leaf as L;
    let of = |class: Class, detail, how| Failure {
        class: Some(class),
        how,
        answer: Injected::Status(class.with(detail).get()),
        times: if how == " for ever" { FOR_EVER } else { 1 },
    };
    let once = |class, detail| vec![of(class, detail, "")];
    let both = |class, detail| [" once", " for ever"].map(|how| of(class, detail, how));
    let busy = match leaf {
        L::PhymemPageReclaim => operand::TDR,
        L::MngCreate | L::MngVpflushdone | L::MngKeyFreeid => operand::KOT,
        L::MngKeyConfig => operand::KET,
        L::PhymemCacheWb => operand::WBCACHE,
        L::MemRangeBlock | L::MemSeptRemove | L::MemPageAug => operand::SEPT_TREE,
        L::MemTrack => operand::TD_EPOCH,
        _ => operand::RCX,
    };
    let mut all = once(Class::OPERAND_INVALID, operand::RCX);
    all.extend(both(Class::OPERAND_BUSY, busy));
    all.push(Failure {
        class: None,
        how: "not called: no way to the processor",
        answer: Injected::Port(Error::Invalid(Field::Cpu, 99)),
        times: 1,
    });
    match leaf {
        L::MngCreate | L::MngAddcx => all.extend(both(Class::RND_NO_ENTROPY, 0)),
        L::MngKeyConfig => all.extend(both(Class::KEY_GENERATION_FAILED, 0)),
        L::PhymemCacheWb => all.extend(both(Class::INTERRUPTED_RESUMABLE, 0)),
        L::MemTrack => all.extend(both(Class::PREVIOUS_TLB_EPOCH_BUSY, 0)),
        _ => {}
    }
    all.extend(match leaf {
        L::MngCreate => once(Class::HKID_NOT_FREE, 0),
        L::MngAddcx | L::PhymemPageReclaim | L::PhymemPageWbinvd => {
            once(Class::PAGE_METADATA_INCORRECT, operand::RCX)
        }
        L::MngVpflushdone => once(Class::FLUSHVP_NOT_DONE, 0),
        L::MngKeyFreeid => once(Class::WBCACHE_NOT_COMPLETE, 0),
        L::PhymemCacheWb => vec![
            of(Class::WBCACHE_RESUME_ERROR, 0, ""),
            of(Class::NO_HKID_READY_TO_WBCACHE, 0, ", wrongly"),
        ],
        L::MemPageRemove | L::MemSeptRemove => once(Class::TLB_TRACKING_NOT_DONE, operand::RCX),
        L::MemPageAug | L::MemPageAdd | L::MemSeptAdd | L::MemRangeBlock => {
            once(Class::EPT_ENTRY_STATE_INCORRECT, operand::RCX)
        }
        _ => vec![],
    });
    match leaf {
        L::MemTrack | L::MemPageRemove | L::MemSeptRemove | L::MemPageAug | L::MemPageAdd => {
            all.extend(once(Class::TD_FATAL, 0));
        }
        L::MemSeptAdd | L::MemRangeBlock | L::VpCreate | L::VpAddcx | L::VpInit | L::VpWr => {
            all.extend(once(Class::TD_FATAL, 0));
        }
        L::MrExtend | L::MrFinalize => all.extend(once(Class::TD_FATAL, 0)),
        L::VpEnter => {
            all.extend(once(Class::HOST_PRIORITY_BUSY_TIMEOUT, 0));
            all.extend(once(Class::NON_RECOVERABLE_VCPU, 0));
            all.extend(once(Class::NON_RECOVERABLE_TD, 0));
            all.extend(once(Class::TD_FATAL, 0));
        }
        _ => {}
    }
    all
}

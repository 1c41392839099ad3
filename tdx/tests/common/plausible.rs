//! The plausible failures of each leaf.

use kvm_ops_core::{Error, Field};
use kvm_ops_tdx::Leaf;
use kvm_ops_tdx::status::{Class, operand};

use super::Answer;

/// An injected failure.
#[derive(Clone, Copy)]
pub struct Failure {
    pub name: &'static str,
    pub answer: Answer,
    pub times: u64,
}

pub const ONCE: u64 = 1;
pub const FOR_EVER: u64 = u64::MAX;

/// The ways in which a leaf can fail, besides those of every leaf.
pub fn failures(leaf: Leaf) -> Vec<Failure> {
    use Leaf as L;
    let of = |name, class: Class, detail, times| Failure {
        name,
        answer: Answer::Status(class.with(detail).get()),
        times,
    };
    let busy = match leaf {
        L::PhymemPageReclaim => operand::TDR,
        L::MngCreate | L::MngVpflushdone | L::MngKeyFreeid => operand::KOT,
        L::MngKeyConfig => operand::KET,
        L::PhymemCacheWb => operand::WBCACHE,
        L::MemRangeBlock | L::MemSeptRemove | L::MemPageAug => operand::SEPT_TREE,
        L::MemTrack => operand::TD_EPOCH,
        _ => operand::RCX,
    };
    let mut all = vec![
        of(
            "OPERAND_INVALID",
            Class::OPERAND_INVALID,
            operand::RCX,
            ONCE,
        ),
        of("OPERAND_BUSY once", Class::OPERAND_BUSY, busy, ONCE),
        of("OPERAND_BUSY for ever", Class::OPERAND_BUSY, busy, FOR_EVER),
        Failure {
            name: "not called: no way to the processor",
            answer: Answer::Port(Error::Invalid(Field::Cpu, 99)),
            times: ONCE,
        },
    ];
    let page = "PAGE_METADATA_INCORRECT";
    all.extend(match leaf {
        L::MngCreate => vec![
            of("RND_NO_ENTROPY once", Class::RND_NO_ENTROPY, 0, ONCE),
            of(
                "RND_NO_ENTROPY for ever",
                Class::RND_NO_ENTROPY,
                0,
                FOR_EVER,
            ),
            of("HKID_NOT_FREE", Class::HKID_NOT_FREE, 0, ONCE),
        ],
        L::MngAddcx => vec![
            of("RND_NO_ENTROPY once", Class::RND_NO_ENTROPY, 0, ONCE),
            of(
                "RND_NO_ENTROPY for ever",
                Class::RND_NO_ENTROPY,
                0,
                FOR_EVER,
            ),
            of(page, Class::PAGE_METADATA_INCORRECT, operand::RCX, ONCE),
        ],
        L::MngKeyConfig => {
            let class = Class::KEY_GENERATION_FAILED;
            vec![
                of("KEY_GENERATION_FAILED once", class, 0, ONCE),
                of("KEY_GENERATION_FAILED for ever", class, 0, FOR_EVER),
            ]
        }
        L::MngVpflushdone => vec![of("FLUSHVP_NOT_DONE", Class::FLUSHVP_NOT_DONE, 0, ONCE)],
        L::MngKeyFreeid => vec![of(
            "WBCACHE_NOT_COMPLETE",
            Class::WBCACHE_NOT_COMPLETE,
            0,
            ONCE,
        )],
        L::PhymemCacheWb => {
            let interrupted = Class::INTERRUPTED_RESUMABLE;
            vec![
                of("INTERRUPTED_RESUMABLE once", interrupted, 0, ONCE),
                of("INTERRUPTED_RESUMABLE for ever", interrupted, 0, FOR_EVER),
                of("WBCACHE_RESUME_ERROR", Class::WBCACHE_RESUME_ERROR, 0, ONCE),
                of(
                    "NO_HKID_READY_TO_WBCACHE, wrongly",
                    Class::NO_HKID_READY_TO_WBCACHE,
                    0,
                    ONCE,
                ),
            ]
        }
        L::MemTrack => {
            let class = Class::PREVIOUS_TLB_EPOCH_BUSY;
            vec![
                of("PREVIOUS_TLB_EPOCH_BUSY once", class, 0, ONCE),
                of("PREVIOUS_TLB_EPOCH_BUSY for ever", class, 0, FOR_EVER),
                of("TD_FATAL", Class::TD_FATAL, 0, ONCE),
            ]
        }
        L::MemPageRemove | L::MemSeptRemove => vec![
            of(
                "TLB_TRACKING_NOT_DONE",
                Class::TLB_TRACKING_NOT_DONE,
                operand::RCX,
                ONCE,
            ),
            of("TD_FATAL", Class::TD_FATAL, 0, ONCE),
        ],
        L::MemPageAug | L::MemPageAdd | L::MemSeptAdd | L::MemRangeBlock => vec![
            of(
                "EPT_ENTRY_STATE_INCORRECT",
                Class::EPT_ENTRY_STATE_INCORRECT,
                operand::RCX,
                ONCE,
            ),
            of("TD_FATAL", Class::TD_FATAL, 0, ONCE),
        ],
        L::PhymemPageReclaim | L::PhymemPageWbinvd => {
            vec![of(page, Class::PAGE_METADATA_INCORRECT, operand::RCX, ONCE)]
        }
        L::VpCreate | L::VpAddcx | L::VpInit | L::VpWr | L::MrExtend | L::MrFinalize => {
            vec![of("TD_FATAL", Class::TD_FATAL, 0, ONCE)]
        }
        _ => vec![],
    });
    all
}

//! Counts jumps and calls in the machine code of the handlers, as the compiler made it for this very program.

extern crate std;

use alloc::collections::BTreeSet;
use alloc::vec;

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction};

use crate::op::Run;
use crate::pair::{COMPARISON_AND_BRANCH, TWO, WITH_END};

/// Longest instruction.
const LONGEST: usize = 15;
/// Upper bound of a handler's code in bytes. A jump to an address beyond it leaves the handler.
const SPAN: u64 = 640;

#[derive(Default)]
struct Found {
    calls: usize,
    /// Jumps to the next op's handler.
    jumps: usize,
    returns: usize,
}

fn decode(at: u64) -> Instruction {
    let code = core::ptr::with_exposed_provenance::<u8>(at as usize);
    // SAFETY: `at` is in a function of this program, whose code is readable, and functions of the
    // standard library follow it.
    let bytes = unsafe { core::slice::from_raw_parts(code, LONGEST) };
    Decoder::with_ip(64, bytes, at, DecoderOptions::NONE).decode()
}

/// Follows a handler's code from its start, both ways at each branch.
fn follow(handler: Run) -> Found {
    let start = (handler as *const ()).expose_provenance() as u64;
    let inside = |at: &u64| (start..start + SPAN).contains(at);
    let (mut open, mut seen) = (vec![start], BTreeSet::new());
    let mut found = Found::default();
    while let Some(at) = open.pop() {
        if !seen.insert(at) {
            continue;
        }
        let i = decode(at);
        match i.flow_control() {
            FlowControl::Next => open.push(i.next_ip()),
            FlowControl::ConditionalBranch => {
                open.push(i.next_ip());
                open.extend(Some(i.near_branch_target()).filter(inside));
            }
            FlowControl::UnconditionalBranch => {
                open.extend(Some(i.near_branch_target()).filter(inside));
            }
            FlowControl::IndirectBranch => found.jumps += 1,
            FlowControl::Return => found.returns += 1,
            FlowControl::Call | FlowControl::IndirectCall => found.calls += 1,
            other => panic!("{other:?} at {at:#x}"),
        }
    }
    found
}

/// True in builds that promise what is counted here.
fn optimised() -> bool {
    let optimised = !cfg!(debug_assertions);
    if !optimised {
        std::println!("skipped: the build is not optimised");
    }
    optimised
}

#[test]
fn handlers_of_pairs_jump_to_the_next_and_call_nothing() {
    if !optimised() {
        return;
    }
    let handlers = TWO.iter().copied().flatten();
    let (mut jumps, mut all) = (0, 0);
    for handler in handlers {
        let found = follow(*handler);
        assert_eq!(found.calls, 0, "of handler {all}");
        jumps += usize::from(found.jumps > 0);
        all += 1;
    }
    assert_eq!(jumps, all, "handlers that jump");
}

#[test]
fn handlers_that_end_a_block_return_and_call_nothing() {
    if !optimised() {
        return;
    }
    let handlers = WITH_END.iter().chain(COMPARISON_AND_BRANCH);
    for (n, handler) in handlers.copied().flatten().enumerate() {
        let found = follow(*handler);
        assert_eq!((found.calls, found.jumps), (0, 0), "of handler {n}");
        assert!(found.returns > 0, "of handler {n}");
    }
}

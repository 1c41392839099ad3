//! The stubs by hand: their places, and the frames that a processor would leave.

use kvm_ops::{Segment, cr0};

use super::*;

fn memory() -> GuestRam {
    GuestRam::new(1 << 20, 0, false).unwrap()
}

/// The registers of a vCPU in the stub of a vector, `behind` bytes into it.
fn in_stub(traps: &Traps, vector: u64, behind: u64) -> Regs {
    Regs {
        rip: traps.stub(vector) + behind,
        rsp: 0x7000,
        ..Regs::default()
    }
}

fn push(ram: &GuestRam, word: u64, words: &[u64]) {
    for (place, value) in (0..).zip(words) {
        let bytes = value.to_le_bytes();
        let at = Gpa::new(0x7000 + place * word);
        ram.write(at, &bytes[..word as usize]).unwrap();
    }
}

/// Special registers of the mode with words of that size.
fn mode(word: u64) -> Sregs {
    let cs = Segment {
        l: word == 8,
        db: word == 4,
        selector: 0x10,
        ..Segment::default()
    };
    Sregs {
        cs,
        cr0: if word == 2 { 0 } else { cr0::PE },
        cr2: 0xdead,
        ..Sregs::default()
    }
}

#[test]
fn each_vector_of_real_mode_leads_to_its_own_stub() {
    let ram = memory();
    let traps = real(&ram, Gpa::new(0x7c00)).unwrap().unwrap();
    let mut table = vec![0; 1024];
    ram.read(Gpa::new(0), &mut table).unwrap();
    let (regs_stack, sregs) = ([0x7c05, 0x123, 2], mode(2));
    push(&ram, 2, &regs_stack);
    for (vector, entry) in (0..).zip(table.chunks(4)) {
        let offset = u16::from_le_bytes([entry[0], entry[1]]);
        let segment = u16::from_le_bytes([entry[2], entry[3]]);
        assert_eq!((u64::from(offset), segment), (traps.stub(vector), 0));
        let mut stub = [0; 2];
        ram.read(Gpa::new(offset.into()), &mut stub).unwrap();
        assert_eq!(stub, [0xe6, 0xf6], "out 0xf6, al");
        // A platform may have stepped over the instruction already.
        for behind in [0, 2] {
            let regs = in_stub(&traps, vector, behind);
            let frame = traps.frame(&regs, &sregs, &ram).unwrap();
            assert_eq!((frame.cs, frame.rip), (0x123, 0x7c05));
            let expected = match vector as u8 {
                vector @ 0..32 => Trap::Exception {
                    vector,
                    error: None,
                    address: None,
                },
                vector => Trap::Interrupt(vector),
            };
            assert_eq!(frame.trap, expected);
        }
    }
}

#[test]
fn int_n_in_real_mode_is_told_from_the_exception_of_that_number() {
    let ram = memory();
    let traps = real(&ram, Gpa::new(0x7c00)).unwrap().unwrap();
    push(&ram, 2, &[0x7c05, 0, 2]);
    let trap = |vector| {
        let frame = traps.frame(&in_stub(&traps, vector, 2), &mode(2), &ram);
        frame.unwrap().trap
    };
    assert!(matches!(trap(0x10), Trap::Exception { vector: 0x10, .. }));
    ram.write(Gpa::new(0x7c03), &[0xcd, 0x10]).unwrap();
    assert_eq!(trap(0x10), Trap::Interrupt(0x10));
    assert!(matches!(trap(0x11), Trap::Exception { vector: 0x11, .. }));
}

#[test]
fn gates_have_the_width_of_the_mode_and_frames_their_error_code() {
    for (long, word) in [(false, 4), (true, 8)] {
        let ram = memory();
        let traps = protected(&ram, long, 0x10).unwrap();
        let gate = if long { 16 } else { 8 };
        assert_eq!(u64::from(idt(long).limit), 256 * gate - 1);
        let mut entry = [0; 8];
        ram.read(Gpa::new(idt(long).base + 6 * gate), &mut entry)
            .unwrap();
        let low = u16::from_le_bytes([entry[0], entry[1]]);
        let high = u16::from_le_bytes([entry[6], entry[7]]);
        assert_eq!(u64::from(high) << 16 | u64::from(low), traps.stub(6));
        assert_eq!(entry[2..6], [0x10, 0, 0, 0x8e]);

        push(&ram, word, &[0x42, 0x10_0000, 0x10, 2]);
        let frame = |vector| {
            let regs = in_stub(&traps, vector, 2);
            traps.frame(&regs, &mode(word), &ram).unwrap()
        };
        let page_fault = frame(14);
        assert_eq!((page_fault.cs, page_fault.rip), (0x10, 0x10_0000));
        let expected = Trap::Exception {
            vector: 14,
            error: Some(0x42),
            address: Some(0xdead),
        };
        assert_eq!(page_fault.trap, expected);
        // Without an error code, the first word is the address.
        assert_eq!(frame(6).rip, 0x42);
        assert_eq!(frame(0x80).trap, Trap::Interrupt(0x80));
    }
}

#[test]
fn code_that_runs_on_into_the_stubs_is_astray() {
    let ram = memory();
    let traps = real(&ram, Gpa::new(0x7c00)).unwrap().unwrap();
    let regs = Regs {
        rip: IVT_STUBS.get() + 2,
        ..Regs::default()
    };
    let frame = traps.frame(&regs, &mode(2), &ram).unwrap();
    assert_eq!((frame.trap, frame.rip), (Trap::Astray, regs.rip));
}

#[test]
fn a_port_written_from_elsewhere_or_in_another_mode_is_no_trap() {
    let ram = memory();
    let traps = real(&ram, Gpa::new(0x7c00)).unwrap().unwrap();
    let end = IVT_STUBS.get() + STUBS_BYTES;
    for rip in [0, IVT_STUBS.get() - 1, end, 0x7c00] {
        let regs = Regs {
            rip,
            ..Regs::default()
        };
        assert_eq!(traps.frame(&regs, &mode(2), &ram), None, "{rip:#x}");
    }
    for word in [4, 8] {
        let regs = in_stub(&traps, 6, 0);
        assert_eq!(traps.frame(&regs, &mode(word), &ram), None);
    }
}

#[test]
fn a_stack_outside_of_memory_leaves_the_vector() {
    let ram = memory();
    let traps = protected(&ram, true, 0x10).unwrap();
    let regs = Regs {
        rsp: 1 << 40,
        ..in_stub(&traps, 13, 2)
    };
    let frame = traps.frame(&regs, &mode(8), &ram).unwrap();
    let expected = Trap::Exception {
        vector: 13,
        error: None,
        address: None,
    };
    assert_eq!(frame.trap, expected);
}

#[test]
fn an_image_that_needs_the_place_keeps_it() {
    let ram = memory();
    assert!(matches!(real(&ram, Gpa::new(0x600)), Ok(None)));
    let mut start = [1; 4];
    ram.read(Gpa::new(0), &mut start).unwrap();
    assert_eq!(start, [0; 4], "nothing is written");
    assert_eq!(idt(false).base, IDT.get());
}

#[test]
fn traps_say_the_name_of_the_exception() {
    for (trap, text) in [
        (
            Trap::Exception {
                vector: 6,
                error: None,
                address: None,
            },
            "exception 6 (#UD, invalid opcode), without a handler",
        ),
        (
            Trap::Exception {
                vector: 14,
                error: Some(2),
                address: Some(0x1000),
            },
            "exception 14 (#PF, page fault) with error code 0x2 at address 0x1000, without a handler",
        ),
        (Trap::Interrupt(0x21), "interrupt 0x21 without a handler"),
        (Trap::Astray, "ran into memory without code"),
    ] {
        assert_eq!(trap.to_string(), text);
    }
}

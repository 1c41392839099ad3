//! Trust domains that execute machine code and go to another host: with the state components of XSAVE, and with their local
//! APIC, the part in the virtual APIC page and the host's.
#![cfg(target_arch = "x86_64")]

mod support;
#[path = "support/td_apic.rs"]
mod td_apic;
#[path = "support/td_journey.rs"]
mod td_journey;
#[path = "support/td_kernel.rs"]
mod td_kernel;

use std::thread;
use std::time::{Duration, Instant};

use iced_x86::code_asm::*;
use kvm_ops::TdParams;
use kvm_ops_machine::{ConsoleSink, End};
use support::{Until, limits};
use td_apic::*;
use td_journey::{Side, travel};
use td_kernel::*;

/// x87, SSE and AVX.
const XFAM: u64 = 7;

/// What the registers hold, and where they are stored to be looked at.
const PATTERN: u64 = DATA + 0x100;
const STORED: u64 = DATA + 0x140;
const WORDS: [u64; 4] = [
    0x0123_4567_89ab_cdef,
    0xfedc_ba98_7654_3210,
    0x0f1e_2d3c_4b5a_6978,
    0x8796_a5b4_c3d2_e1f0,
];
/// Control words that no reset leaves: round up, flush to zero.
const FCW: u32 = 0x0b7f;
const MXCSR: u32 = 0x9f80;
const PI: u64 = std::f64::consts::PI.to_bits();

/// Two vectors: one that waits in the virtual APIC page, and a posted one.
const WAITING: u8 = 0x50;

fn params() -> TdParams {
    TdParams {
        xfam: XFAM,
        ..TdParams::default()
    }
}

/// Fills YMM5, XMM3 and ST(0), and sets the control words.
fn fill(a: &mut CodeAssembler) -> Assembled {
    const OSFXSR: i32 = 1 << 9;
    const OSXSAVE: i32 = 1 << 18;
    a.mov(rax, cr4)?;
    a.or(eax, OSFXSR | OSXSAVE)?;
    a.mov(cr4, rax)?;
    a.xor(ecx, ecx)?;
    a.xor(edx, edx)?;
    a.mov(eax, XFAM as u32)?;
    a.xsetbv()?;
    for (n, word) in WORDS.into_iter().enumerate() {
        a.mov(rax, word)?;
        a.mov(qword_ptr(PATTERN + n as u64 * 8), rax)?;
    }
    a.vmovdqu(ymm5, ymmword_ptr(PATTERN))?;
    a.movdqu(xmm3, xmmword_ptr(PATTERN + 8))?;
    a.mov(dword_ptr(STORED), FCW)?;
    a.fninit()?;
    a.fldcw(word_ptr(STORED))?;
    a.fldpi()?;
    a.mov(dword_ptr(STORED), MXCSR)?;
    a.ldmxcsr(dword_ptr(STORED))
}

/// Sets the flags to equal if all of it is as [`fill`] left it. Changes RAX, RCX and RDX.
fn look(a: &mut CodeAssembler) -> Assembled {
    let mut differs = a.create_label();
    let compare = |a: &mut CodeAssembler, from: u64, with: u64| -> Assembled {
        a.mov(rax, qword_ptr(from))?;
        a.mov(rdx, with)?;
        a.cmp(rax, rdx)?;
        a.jne(differs)
    };
    a.vmovdqu(ymmword_ptr(STORED), ymm5)?;
    for (n, word) in WORDS.into_iter().enumerate() {
        compare(a, STORED + n as u64 * 8, word)?;
    }
    a.movdqu(xmmword_ptr(STORED), xmm3)?;
    compare(a, STORED, WORDS[1])?;
    compare(a, STORED + 8, WORDS[2])?;
    // Not as exact as it is, and to the nearest, as the copy of ST(0) goes away.
    a.fst(qword_ptr(STORED))?;
    a.mov(rax, qword_ptr(STORED))?;
    a.mov(rdx, PI)?;
    a.sub(rax, rdx)?;
    a.cmp(rax, 1)?;
    a.ja(differs)?;
    a.mov(qword_ptr(STORED), 0)?;
    a.fnstcw(word_ptr(STORED))?;
    compare(a, STORED, FCW.into())?;
    a.stmxcsr(dword_ptr(STORED))?;
    compare(a, STORED, MXCSR.into())?;
    a.set_label(&mut differs)?;
    a.nop()
}

/// Counts interrupts of a periodic timer, and prints a full stop each time its registers are as they were.
fn ticks(a: &mut CodeAssembler) -> Assembled {
    fill(a)?;
    set(a, SPURIOUS_VECTOR, ENABLED)?;
    set(a, DIVIDE, BY_1)?;
    set(a, TIMER, PERIODIC | u32::from(VECTOR))?;
    set(a, INITIAL_COUNT, 400)?;
    a.sti()?;
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.cmp(qword_ptr(COUNT), 5)?;
    a.jb(again)?;
    a.mov(qword_ptr(COUNT), 0)?;
    look(a)?;
    print_if_equal(a, '.')?;
    a.jmp(again)
}

#[test]
fn a_td_that_runs_keeps_its_registers_and_its_timer_at_another_host() {
    let image = || kernel(ticks, &[(VECTOR, counts)]);
    let mut sides = [Side::new(), Side::new()];
    let mut from = sides[0].machine(config(image()), params(), false);
    let mut to = sides[1].machine(config(image()), params(), true);
    let [here, there] = [ConsoleSink::capture(), ConsoleSink::capture()];
    let devices = from.devices(here.clone());
    let (report, progress) = from
        .run_while(&devices, limits(), |parts| {
            let start = Instant::now();
            while here.text().len() < 3 && start.elapsed() < Duration::from_secs(30) {
                thread::sleep(Duration::from_millis(1));
            }
            travel(&mut sides, parts.vm(), &mut to)
        })
        .unwrap();
    assert_eq!(report.end, End::Left, "{report:?}");
    assert_eq!(here.text(), ".".repeat(here.text().len()));
    assert!(progress.pages > 0, "{progress:?}");
    let until = Until::new(to.devices(there.clone()), there.clone(), "...");
    until.run(&mut to, limits());
    let texts = [here, there].map(|console| console.text());
    for text in &texts {
        assert!(
            text.len() >= 3 && text.bytes().all(|it| it == b'.'),
            "{texts:?}"
        );
    }
    assert!(from.destroy().is_clean() && to.destroy().is_clean());
    sides.into_iter().for_each(Side::destroy);
}

/// Handler of the vector that waits: prints `w`.
fn prints_w(a: &mut CodeAssembler) -> Assembled {
    handler(a, |a| {
        print(a, "w")?;
        end_of_interrupt(a)
    })
}

/// Arms its timer for a deadline, requests an interrupt that it does not take yet, and says so. Then it takes that one, and
/// waits for the timer.
fn waits(a: &mut CodeAssembler) -> Assembled {
    const AHEAD: i32 = 2_000_000;
    fill(a)?;
    set(a, SPURIOUS_VECTOR, ENABLED)?;
    set(a, TIMER, BY_DEADLINE | u32::from(VECTOR))?;
    time(a)?;
    a.lea(rbx, ptr(rax + AHEAD))?;
    a.mov(r12d, TSC_DEADLINE)?;
    a.mov(r13, rbx)?;
    vmcall(a, WRMSR)?;
    set_own(a, TASK_PRIORITY, 0x10)?;
    set_own(a, SELF_INTERRUPT, WAITING.into())?;
    print(a, "armed")?;
    // From here on at the other host.
    a.mov(ecx, TASK_PRIORITY)?;
    a.rdmsr()?;
    a.cmp(eax, 0x10)?;
    print_if_equal(a, 'p')?;
    look(a)?;
    print_if_equal(a, 'r')?;
    a.sti()?;
    a.nop()?;
    let mut waiting = a.create_label();
    a.set_label(&mut waiting)?;
    a.cmp(qword_ptr(COUNT), 0)?;
    a.je(waiting)?;
    a.mov(rax, qword_ptr(WHEN))?;
    a.sub(rax, rbx)?;
    print_if_below(a, 64, 't')?;
    end(a)
}

#[test]
fn interrupts_that_wait_and_a_deadline_go_along_to_the_instruction() {
    let image = || kernel(waits, &[(VECTOR, counts), (WAITING, prints_w)]);
    let mut sides = [Side::new(), Side::new()];
    let mut from = sides[0].machine(config(image()), params(), false);
    let mut to = sides[1].machine(config(image()), params(), true);
    let [here, there] = [ConsoleSink::capture(), ConsoleSink::capture()];
    let until = Until::new(from.devices(here.clone()), here.clone(), "armed");
    until.run(&mut from, limits());
    travel(&mut sides, from.vm(), &mut to);
    assert!(from.destroy().is_clean());
    let until = Until::new(to.devices(there.clone()), there.clone(), ".");
    until.run(&mut to, limits());
    assert_eq!(there.text(), "prwt.", "after {}", here.text());
    assert!(to.destroy().is_clean());
    sides.into_iter().for_each(Side::destroy);
}

/// Handler of NMIs. In the first it sends another one to itself, which waits for the IRET, and says so; from there on it is at
/// the other host.
fn nests(a: &mut CodeAssembler) -> Assembled {
    handler(a, |a| {
        let mut again = a.create_label();
        let mut done = a.create_label();
        a.inc(qword_ptr(COUNT))?;
        a.cmp(qword_ptr(COUNT), 1)?;
        a.jne(again)?;
        set(a, COMMAND, NMI_TO_SELF)?;
        print(a, "(")?;
        print(a, ")")?;
        a.jmp(done)?;
        a.set_label(&mut again)?;
        print(a, "n")?;
        a.set_label(&mut done)?;
        a.nop()
    })
}

/// Goes on when two NMIs came.
fn is_interrupted(a: &mut CodeAssembler) -> Assembled {
    set(a, COMMAND, NMI_TO_SELF)?;
    let mut waiting = a.create_label();
    a.set_label(&mut waiting)?;
    a.cmp(qword_ptr(COUNT), 2)?;
    a.jb(waiting)?;
    end(a)
}

#[test]
fn an_nmi_waits_at_the_other_host_until_the_handler_that_came_along_returns() {
    let image = || kernel(is_interrupted, &[(NMI, nests)]);
    let mut sides = [Side::new(), Side::new()];
    let mut from = sides[0].machine(config(image()), params(), false);
    let mut to = sides[1].machine(config(image()), params(), true);
    let [here, there] = [ConsoleSink::capture(), ConsoleSink::capture()];
    let until = Until::new(from.devices(here.clone()), here.clone(), "(");
    until.run(&mut from, limits());
    travel(&mut sides, from.vm(), &mut to);
    assert!(from.destroy().is_clean());
    let until = Until::new(to.devices(there.clone()), there.clone(), ".");
    until.run(&mut to, limits());
    assert_eq!((here.text(), there.text()), ("(".into(), ")n.".into()));
    assert!(to.destroy().is_clean());
    sides.into_iter().for_each(Side::destroy);
}

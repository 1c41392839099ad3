//! Every user-level form against the processor that runs the test.
//!
//! Each form is made with random registers, memory and immediates, encoded, executed natively in
//! this process and on [`Cpu`], and compared: registers, defined flags, memory, and the exception.
//! `KVM_OPS_CPU_ROUNDS` sets the operand sets tried for each form (default 24); with some thousand
//! the test takes minutes.

#![allow(unreachable_pub)]
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

#[path = "../common/mod.rs"]
mod common;
mod forms;
mod host;
mod random;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::{Ram, TestBus};
use host::{ARENA, DATA, DATA_LEN, Native, Registers, components};
use iced_x86::{Code, CpuidFeature as F, Instruction, Mnemonic as M, OpKind, RflagsBits};
use kvm_ops_cpu::{Cause, CodePages, Cpu, CpuidTable, Segment, Stopped};
use random::Random;

const TABLES: u64 = 0x10_0000;
const _: () = assert!(ARENA <= TABLES);

/// Processor in 64-bit mode at CPL 3, with the arena mapped where the native one is.
struct Emulated {
    cpu: Cpu,
    ram: Arc<Ram>,
    pages: Arc<CodePages>,
    base: u64,
}

impl Emulated {
    fn new(base: u64) -> Self {
        let ram = Ram::new(0x20_0000);
        // One 1 GiB page, user and writable, over all arenas.
        let bus = TestBus {
            base,
            ..TestBus::new(&ram)
        };
        let pages = CodePages::new(512);
        let mut cpu = Cpu::new(Box::new(bus), pages.clone(), CpuidTable::amd());
        let root = base + TABLES;
        ram.write_u64(TABLES, (root + 0x1000) | 7);
        ram.write_u64(TABLES + 0x1000, 0x87);
        let mut r = cpu.registers();
        let flat = |selector, rights| Segment {
            selector,
            base: 0,
            limit: u32::MAX,
            rights,
        };
        r.segments = [flat(0x2b, 0xc0f3); 6];
        r.segments[1] = flat(0x33, 0xa0fb);
        r.cr0 = 0x8001_0033;
        r.cr3 = root;
        r.cr4 = 0x4_0620;
        r.xcr0 = 7;
        r.efer = 0xd01;
        r.rflags = 0x202;
        cpu.set_registers(&r);
        cpu.controls_mut().exceptions = u32::MAX;
        Self {
            cpu,
            ram,
            pages,
            base,
        }
    }

    fn place(&mut self, at: u64, bytes: &[u8]) {
        self.ram.write(at - self.base, bytes);
        self.pages.written(at, bytes.len());
    }

    /// Runs one instruction; the vector of its exception, if any.
    fn run(&mut self, registers: &mut Registers, at: u64) -> Option<u8> {
        for (n, value) in registers.gpr.iter().enumerate() {
            self.cpu.set_gpr(n, *value);
        }
        let loaded = self.cpu.load_xsave(registers.extended());
        loaded.expect("a state that XRSTOR takes");
        self.cpu.set_rflags(registers.flags | 0x202);
        self.cpu.set_rip(at);
        let mut vector = None;
        // A repeated string instruction may need several turns.
        for _ in 0..64 {
            match self.cpu.run(1) {
                Stopped::Budget => {}
                Stopped::Exit(exit) => {
                    let Cause::Exception(e) = exit.cause else {
                        panic!("exit {exit:?}")
                    };
                    vector = Some(e.vector);
                }
                other => panic!("stopped: {other:?}"),
            }
            if self.cpu.rip() != at || vector.is_some() {
                break;
            }
        }
        for (n, value) in registers.gpr.iter_mut().enumerate() {
            *value = self.cpu.gpr(n);
        }
        let area = self.cpu.save_xsave();
        let extended = registers.extended();
        let (same, _) = area.split_at(extended.len());
        extended.copy_from_slice(same);
        registers.flags = self.cpu.rflags();
        vector
    }
}

fn features_allowed(code: Code) -> bool {
    code.cpuid_features().iter().all(|f| {
        matches!(
            f,
            F::INTEL8086
                | F::INTEL186
                | F::INTEL286
                | F::INTEL386
                | F::INTEL486
                | F::INTEL8086_ONLY
                | F::AVX
                | F::AVX2
                | F::FMA
                | F::F16C
                | F::MMX
                | F::FPU
                | F::FPU287
                | F::FPU387
                | F::X64
                | F::CMOV
                | F::CX8
                | F::CMPXCHG16B
                | F::BMI1
                | F::BMI2
                | F::LZCNT
                | F::POPCNT
                | F::ADX
                | F::MOVBE
                | F::SSE
                | F::SSE2
                | F::SSE3
                | F::SSSE3
                | F::SSE4_1
                | F::SSE4_2
                | F::AES
                | F::PCLMULQDQ
                | F::SHA
                | F::MULTIBYTENOP
        )
    })
}

/// Forms that are not compared, each for a reason that names its kind.
fn left_out(i: &Instruction) -> bool {
    use iced_x86::FlowControl;
    let m = i.mnemonic();
    // Branches have no place in a thunk; tests/flow.rs has them.
    i.flow_control() != FlowControl::Next
        // Privileged or dependent on IOPL, TSS and tables.
        || i.is_privileged()
        || matches!(m, M::In | M::Out | M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd)
        || matches!(m, M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw)
        || matches!(m, M::Lar | M::Lsl | M::Verr | M::Verw | M::Lfs | M::Lgs | M::Lss)
        // Results that differ between processors or from one execution to the next.
        || matches!(i.code(), Code::Reservednop_rm16_r16_0F0D | Code::Reservednop_rm32_r32_0F0D | Code::Reservednop_rm64_r64_0F0D)
        || matches!(m, M::Cpuid | M::Rdtsc | M::Rdtscp | M::Rdpid)
        // The frame of ENTER and POPF would switch TF and AC on in the test process.
        || matches!(m, M::Enter | M::Leave | M::Popf | M::Popfd | M::Popfq | M::Pause)
}

fn data_window(native: &Native) -> u64 {
    native.base + DATA + 0x1000
}

fn prepare(i: &Instruction, native: &mut Native, rng: &mut Random) -> Registers {
    let mut r = Registers::zero();
    for n in 0..16 {
        r.gpr[n] = rng.edge();
        r.xmm[n] = [rng.float(), rng.float()];
        r.high[n] = [rng.float(), rng.float()];
    }
    // Mostly masked; rounding, denormals as zeros and flush to zero at random.
    r.mxcsr = 0x1f80 | rng.next() as u32 & 0xe040;
    if rng.below(8) == 0 {
        r.mxcsr &= !(rng.next() as u32 & 0x1f80);
    }
    r.gpr[4] = native.base + DATA + DATA_LEN - 0x800;
    let window = data_window(native);
    r.gpr[15] = window;
    let string = (0..i.op_count()).any(|n| {
        matches!(
            i.op_kind(n),
            OpKind::MemorySegRSI | OpKind::MemoryESRDI | OpKind::MemorySegRDI
        )
    });
    if string {
        r.gpr[6] = window + rng.below(256);
        r.gpr[7] = window + 0x400 + rng.below(256);
        r.gpr[1] = rng.below(20);
    }
    match i.mnemonic() {
        M::Xlatb => r.gpr[3] = window,
        M::Bt | M::Bts | M::Btr | M::Btc if i.op1_kind() == OpKind::Register => {
            let n = i.op1_register().full_register() as usize - iced_x86::Register::RAX as usize;
            if i.op0_kind() == OpKind::Memory {
                r.gpr[n] = (rng.below(4096) as i64 - 2048) as u64;
            }
        }
        // 16-bit double shifts by more than 16 are undefined.
        M::Shld | M::Shrd if i.op0_register().size() == 2 || i.memory_size().size() == 2 => {
            r.gpr[1] = rng.below(17);
        }
        _ => {}
    }
    let arithmetic = 0x8d5;
    r.flags = 0x202 | rng.next() & arithmetic | if string { rng.next() & 0x400 } else { 0 };
    if i.is_vsib() {
        // The indices of a gather stay in the window, at multiples of eight.
        let n = i.memory_index().number();
        let mut index = || (rng.below(128) * 8) | ((rng.below(128) * 8) << 32);
        let wide = i.is_vsib64();
        let mut pair = || [index(), index()].map(|v| if wide { v & 0xffff_ffff } else { v });
        (r.xmm[n], r.high[n]) = (pair(), pair());
    }
    if is_mmx(i.code()) {
        r.st = std::array::from_fn(|_| [rng.edge(), 0xffff]);
        r.tags = rng.next() as u8;
    }
    if is_x87(i.code()) {
        prepare_x87(&mut r, rng);
    }
    let floats = is_x87(i.code()) && rng.below(2) == 0;
    for word in native.data().chunks_exact_mut(8) {
        let value = if floats { rng.float() } else { rng.edge() };
        word.copy_from_slice(&value.to_le_bytes());
    }
    r
}

fn undefined_flags(i: &Instruction) -> u64 {
    let bits = i.rflags_undefined();
    let mut mask = 0;
    for (bit, flag) in [
        (RflagsBits::OF, 1 << 11),
        (RflagsBits::SF, 1 << 7),
        (RflagsBits::ZF, 1 << 6),
        (RflagsBits::AF, 1 << 4),
        (RflagsBits::CF, 1 << 0),
        (RflagsBits::PF, 1 << 2),
    ] {
        if bits & bit != 0 {
            mask |= flag;
        }
    }
    mask
}

fn vector_of(signal: i32) -> Option<u8> {
    match signal {
        0 => None,
        libc::SIGFPE => Some(0),
        libc::SIGILL => Some(6),
        _ => Some(13),
    }
}

/// The signal does not distinguish #PF from #GP, nor #XM from #DE.
fn host_vector(v: u8) -> u8 {
    match v {
        14 => 13,
        19 => 0,
        v => v,
    }
}

fn is_x87(code: Code) -> bool {
    let features = code.cpuid_features();
    let x87 = |f: &F| matches!(f, F::FPU | F::FPU287 | F::FPU387);
    features.iter().any(x87) && code != Code::Wait
}

fn is_approximate(m: M) -> bool {
    use M::{Rcpps, Rcpss, Rsqrtps, Rsqrtss, Vrcpps, Vrcpss, Vrsqrtps, Vrsqrtss};
    matches!(
        m,
        Rcpps | Rcpss | Rsqrtps | Rsqrtss | Vrcpps | Vrcpss | Vrsqrtps | Vrsqrtss
    )
}

/// Takes singles as they are on the host where both are right: two relative errors of 1.5 * 2^-12.
fn approximate(real: &[[u64; 2]; 16], ours: &mut [[u64; 2]; 16]) {
    for (real, ours) in real.as_flattened().iter().zip(ours.as_flattened_mut()) {
        for shift in [0, 32] {
            let [a, b] = [*real, *ours].map(|v| f32::from_bits((v >> shift) as u32));
            // The least normal number may be flushed to zero.
            let flushed = a == 0.0 && b.abs() <= f32::MIN_POSITIVE * 1.01;
            if flushed || a.is_normal() && (a - b).abs() <= a.abs() * (3.0 / 4096.0) {
                *ours = *ours & !(0xffff_ffff << shift) | u64::from(a.to_bits()) << shift;
            }
        }
    }
}

fn is_transcendental(m: M) -> bool {
    use M::{F2xm1, Fcos, Fpatan, Fptan, Fsin, Fsincos, Fyl2x, Fyl2xp1};
    matches!(
        m,
        F2xm1 | Fcos | Fpatan | Fptan | Fsin | Fsincos | Fyl2x | Fyl2xp1
    )
}

/// True if the architecture defines no result for ST(0), or processors reduce it differently.
fn out_of_range(m: M, before: &Registers) -> bool {
    let exponent = before.st[0][1] & 0x7fff;
    match m {
        M::F2xm1 => exponent >= 0x3fff,
        M::Fsin | M::Fcos | M::Fsincos | M::Fptan => (0x3ffe..0x7fff).contains(&exponent),
        // From 1/sqrt(2) - 1 to sqrt(2) - 1.
        M::Fyl2xp1 => exponent >= 0x3ffd,
        _ => false,
    }
}

/// Takes numbers as they are on the host where they are within two of the last bits.
fn nearly(real: &Registers, ours: &mut Registers) {
    for (real, ours) in real.st.iter().zip(&mut ours.st) {
        let key = |v: &[u64; 2]| u128::from(v[0]) | u128::from(v[1] & 0x7fff) << 64;
        // The step of a significand from 2^64 - 1 to 2^63 is one too.
        let linear = |v: u128| (v >> 64) << 63 | v & (u128::from(u64::MAX) >> 1);
        let near = linear(key(real)).abs_diff(linear(key(ours))) <= 2;
        let same_sign = (real[1] ^ ours[1]) & 0x8000 == 0;
        if near && same_sign {
            *ours = *real;
        }
    }
}

fn is_mmx(code: Code) -> bool {
    let info = code.op_code();
    use iced_x86::OpCodeOperandKind as K;
    let mm = |n| matches!(info.op_kind(n), K::mm_reg | K::mm_rm | K::mm_or_mem);
    code == Code::Emms || (0..info.op_count()).any(mm)
}

fn is_avx(code: Code) -> bool {
    let avx = |f: &F| matches!(f, F::AVX | F::AVX2);
    code.cpuid_features().iter().any(avx)
}

fn is_fused_or_half(code: Code) -> bool {
    let extension = |f: &F| matches!(f, F::FMA | F::F16C);
    code.cpuid_features().iter().any(extension)
}

/// A stack of numbers, of which some registers are empty; exceptions mostly masked, and none pending.
fn prepare_x87(r: &mut Registers, rng: &mut Random) {
    r.control = 0x37f & !0x300 | rng.next() as u16 & 0xf00;
    // Precision 1 is reserved.
    if r.control >> 8 & 3 == 1 {
        r.control |= 0x300;
    }
    if rng.below(6) == 0 {
        r.control &= !(rng.next() as u16 & 0x3f);
    }
    r.status = rng.next() as u16 & 0x7f00 & 0x7f00;
    if rng.below(4) == 0 {
        r.status |= r.control & rng.next() as u16 & 0x3f;
    }
    r.tags = match rng.below(6) {
        0 => rng.next() as u8,
        1 => 0xff,
        // Something in the first two registers, and room for more.
        _ => {
            let top = u32::from(r.status >> 11 & 7);
            (0b0000_0111_u8 | rng.next() as u8 & 0x38).rotate_left(top)
        }
    };
    r.st = std::array::from_fn(|_| rng.extended());
}

/// True if the instruction compared, and an exception that is not masked kept it from being complete. Condition
/// codes and flags are not set then by Intel's processors, and are by AMD's.
fn comparison_failed(code: Code, after: &Registers) -> bool {
    let compares = matches!(
        code.mnemonic(),
        M::Fcom
            | M::Fcomp
            | M::Fcompp
            | M::Fucom
            | M::Fucomp
            | M::Fucompp
            | M::Ficom
            | M::Ficomp
            | M::Ftst
            | M::Fcomi
            | M::Fcomip
            | M::Fucomi
            | M::Fucomip
    );
    compares && after.status & 0x80 != 0
}

/// True if MXCSR is loaded with bit 17. It is AMD's mask of misaligned accesses; Intel's processors refuse it.
fn masks_misaligned(i: &Instruction, native: &mut Native) -> bool {
    let word = i.memory_displacement64() as usize + 0x1000;
    let loads = matches!(i.mnemonic(), M::Ldmxcsr | M::Vldmxcsr);
    loads && native.data()[word + 2] & 2 != 0
}

/// True if a denormal was to be loaded, and that exception is not masked. TOP remains then (SDM volume 1, 8.5.2); AMD's
/// processors push the number.
fn denormal_loaded(code: Code, after: &Registers) -> bool {
    const DENORMAL: u16 = 1 << 1;
    let loads = matches!(code, Code::Fld_m32fp | Code::Fld_m64fp);
    loads && after.status & !after.control & DENORMAL != 0
}

/// Bits of the status word that are not compared.
fn undefined_status(code: Code, after: &Registers) -> u16 {
    let codes = if comparison_failed(code, after) {
        0x4500
    } else {
        0
    };
    // C1 is cleared by Intel's processors alone.
    let c1 = match code.mnemonic() {
        M::Fcomi | M::Fcomip | M::Fucomi | M::Fucomip => 0x200,
        _ => 0,
    };
    codes | c1
}

struct Outcome {
    compared: u64,
    missing: bool,
}

fn compare(
    code: Code,
    repeat: bool,
    native: &mut Native,
    emulated: &mut Emulated,
    rng: &mut Random,
    rounds: u64,
) -> Option<Outcome> {
    let mut outcome = Outcome {
        compared: 0,
        missing: false,
    };
    let mut made = false;
    for _ in 0..rounds {
        let Some(mut i) = forms::make(code, rng) else {
            break;
        };
        if left_out(&i) {
            break;
        }
        let wide_shift = matches!(code, Code::Shld_rm16_r16_imm8 | Code::Shrd_rm16_r16_imm8);
        if wide_shift && i.immediate8() & 31 > 16 {
            continue;
        }
        if repeat {
            i.set_has_rep_prefix(true);
        }
        // High bytes can not be combined with a REX prefix; the next round takes others.
        let Some(bytes) = forms::encode(&i, native.code()) else {
            continue;
        };
        // WAIT and an instruction are two.
        if bytes.len() > 1 && bytes[0] == 0x9b {
            break;
        }
        made = true;
        native.place(&bytes);
        let at = native.code();
        emulated.place(at, &bytes);
        for _ in 0..4 {
            let before = prepare(&i, native, rng);
            if masks_misaligned(&i, native) {
                continue;
            }
            let mut real = before;
            let mut ours = before;
            emulated.ram.write(DATA, native.data());
            let vector = emulated.run(&mut ours, at);
            if vector == Some(6) && !emulated.cpu.missing().is_empty() {
                let name = format!("{code:?}");
                if emulated.cpu.missing().iter().any(|(n, _)| *n == name) {
                    outcome.missing = true;
                    return Some(outcome);
                }
            }
            let signal = native.run(&mut real);
            outcome.compared += 1;
            let context = || format!("{i} ({code:?}, bytes {bytes:02x?})\nbefore {before:x?}");
            assert_eq!(vector_of(signal), vector.map(host_vector), "{}", context());
            if signal != 0 {
                continue;
            }
            let end = at + bytes.len() as u64;
            assert_eq!(emulated.cpu.rip(), end, "rip, {}", context());
            if out_of_range(i.mnemonic(), &before) || denormal_loaded(code, &real) {
                continue;
            }
            assert_eq!(
                real.gpr.map(Hex),
                ours.gpr.map(Hex),
                "registers, {}",
                context()
            );
            if is_approximate(i.mnemonic()) {
                approximate(&real.xmm, &mut ours.xmm);
                approximate(&real.high, &mut ours.high);
            }
            assert_eq!(
                real.xmm.map(Wide),
                ours.xmm.map(Wide),
                "vectors, {}",
                context()
            );
            if components() & 4 != 0 {
                let high = |r: &Registers| r.high.map(Wide);
                assert_eq!(high(&real), high(&ours), "upper halves, {}", context());
            }
            let mut ignored = undefined_status(code, &real);
            if is_transcendental(i.mnemonic()) {
                // Which way the last bit was rounded, and if that was exact.
                ignored |= 0x200 | 0x80b0;
            }
            // The SDM says that this uses up the x87's stack. AMD's processors do so for a register alone.
            let tags = match i.op1_kind() == OpKind::Memory && code == Code::Cvtpi2ps_xmm_mmm64 {
                true => 0,
                false => 0xff,
            };
            let x87 = |r: &Registers| (r.control, r.status & !ignored, r.tags & tags);
            assert_eq!(
                x87(&real),
                x87(&ours),
                "control, status and tags, {}",
                context()
            );
            if is_transcendental(i.mnemonic()) {
                nearly(&real, &mut ours);
            }
            let st = |r: &Registers| r.st.map(|[low, high]| Wide([low, high & 0xffff]));
            assert_eq!(st(&real), st(&ours), "stack, {}", context());
            assert_eq!(
                Hex(real.mxcsr.into()),
                Hex(ours.mxcsr.into()),
                "mxcsr, {}",
                context()
            );
            let mut mask = 0xcd5 & !undefined_flags(&i);
            if comparison_failed(code, &real) {
                mask = 0;
            }
            assert_eq!(
                Hex(real.flags & mask),
                Hex(ours.flags & mask),
                "flags, {}",
                context()
            );
            let mut memory = vec![0; DATA_LEN as usize];
            emulated.ram.read(DATA, &mut memory);
            if matches!(i.mnemonic(), M::Fnstenv | M::Fnsave) {
                // AMD's processors write the pointers only while an exception is pending.
                let window = i.memory_displacement64() as usize + 0x1000;
                let head = if i.memory_size().size() % 80 == 14 {
                    6..14
                } else {
                    12..28
                };
                let pointers = window + head.start..window + head.end;
                memory[pointers.clone()].copy_from_slice(&native.data()[pointers]);
            }
            assert!(native.data() == memory.as_slice(), "memory, {}", context());
        }
    }
    made.then_some(outcome)
}

#[derive(PartialEq, Eq)]
struct Hex(u64);

impl std::fmt::Debug for Hex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

#[derive(PartialEq, Eq)]
struct Wide([u64; 2]);

impl std::fmt::Debug for Wide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}_{:016x}", self.0[1], self.0[0])
    }
}

fn rounds() -> u64 {
    std::env::var("KVM_OPS_CPU_ROUNDS")
        .ok()
        .and_then(|r| r.parse().ok())
        .unwrap_or(24)
}

fn run_all(keep: impl Fn(Code) -> bool, least: usize) {
    let mut native = Native::new();
    let mut emulated = Emulated::new(native.base);
    let mut rng = Random(1);
    let (mut forms, mut compared, mut missing) = (0, 0, BTreeMap::new());
    let mut different = Vec::new();
    for code in Code::values().filter(|c| c.op_code().mode64() && features_allowed(*c)) {
        if !keep(code) || code == Code::Zero_bytes {
            continue;
        }
        for repeat in [false, true] {
            let string = (0..code.op_code().op_count()).any(|n| {
                use iced_x86::OpCodeOperandKind as K;
                matches!(code.op_code().op_kind(n), K::seg_rSI | K::es_rDI)
            });
            if repeat && !string {
                continue;
            }
            // One form's difference does not hide another's.
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                compare(code, repeat, &mut native, &mut emulated, &mut rng, rounds())
            }));
            let Ok(done) = done else {
                different.push(code);
                continue;
            };
            match done {
                Some(o) if o.missing => {
                    *missing.entry(format!("{:?}", code.mnemonic())).or_insert(0) += 1
                }
                Some(o) => {
                    forms += 1;
                    compared += o.compared;
                }
                None => {}
            }
        }
    }
    assert!(
        different.is_empty(),
        "forms that differ, with a message each above: {different:?}"
    );
    println!("{forms} forms, {compared} operand sets, 0 differences; missing: {missing:?}");
    assert!(
        forms >= least,
        "only {forms} forms were compared; missing {missing:?}"
    );
}

fn is_vector(code: Code) -> bool {
    code.op_code().op_count() > 0
        && code.cpuid_features().iter().any(|f| {
            matches!(
                f,
                F::SSE
                    | F::SSE2
                    | F::SSE3
                    | F::SSSE3
                    | F::SSE4_1
                    | F::SSE4_2
                    | F::AES
                    | F::PCLMULQDQ
                    | F::SHA
            )
        })
}

#[test]
fn x87_forms_compute_what_the_host_computes() {
    run_all(is_x87, 148);
}

#[test]
fn mmx_forms_compute_what_the_host_computes() {
    run_all(is_mmx, 103);
}

#[test]
fn avx_forms_compute_what_the_host_computes() {
    if !std::is_x86_feature_detected!("avx2") {
        println!("skipped: the host has no AVX2");
        return;
    }
    run_all(|c| is_avx(c) && !is_fused_or_half(c), 569);
}

#[test]
fn fused_and_half_precision_forms_compute_what_the_host_computes() {
    if !std::is_x86_feature_detected!("fma") || !std::is_x86_feature_detected!("f16c") {
        println!("skipped: the host has no FMA or no F16C");
        return;
    }
    run_all(is_fused_or_half, 100);
}

#[test]
fn integer_forms_compute_what_the_host_computes() {
    run_all(
        |c| {
            let other = [is_vector, is_x87, is_mmx, is_avx, is_fused_or_half];
            !other.iter().any(|is| is(c))
        },
        633,
    );
}

#[test]
fn vector_forms_compute_what_the_host_computes() {
    run_all(|c| is_vector(c) && !is_mmx(c), 315);
}

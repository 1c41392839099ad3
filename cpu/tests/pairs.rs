//! Random programs of frequent instructions: what one handler runs for two ops is what two handlers compute.

mod common;
#[path = "native/random.rs"]
#[allow(dead_code, unreachable_pub)]
mod random;

use common::long_mode::{CODE, machine};
use iced_x86::code_asm::*;
use kvm_ops_cpu::{Dispatch, Registers, Stopped};
use random::Random;

const DATA: u64 = 0x4_0000;
/// The last bytes of the page tables' only page: what reaches over them faults.
const EDGE: u64 = 0x20_0000 - 12;
/// Code lies in this page, so stores to it are slow.
const NEAR_CODE: u64 = CODE + 0xc00;
const MEMORY: usize = 0x10_0000;

/// Registers that programs change. RBX, RBP and R15 hold addresses.
const WIDE: [AsmRegister64; 8] = [rax, rcx, rdx, rsi, rdi, r8, r9, r10];
const HALF: [AsmRegister32; 8] = [eax, ecx, edx, esi, edi, r8d, r9d, r10d];
const LOW: [AsmRegister8; 8] = [al, cl, dl, sil, dil, r8b, r9b, r10b];

struct Writer {
    a: CodeAssembler,
    random: Random,
}

impl Writer {
    fn pick<T: Copy>(&mut self, list: &[T; 8]) -> T {
        list[self.random.below(8) as usize]
    }

    fn memory(&mut self) -> AsmMemoryOperand {
        let offset = self.random.below(24) as i32;
        let base = match self.random.below(48) {
            0 => rbp,
            1..4 => r15,
            _ => rbx,
        };
        // The address of a device, behind memory.
        let device = if self.random.below(16) == 0 {
            0xe_0000
        } else {
            0
        };
        base + offset + device
    }

    fn immediate(&mut self) -> i32 {
        self.random.edge() as i32 >> self.random.below(32)
    }

    /// An instruction that can be the first of a pair, and often the second too.
    fn body(&mut self, stack: bool) -> Result<(), IcedError> {
        let (d, s) = (self.pick(&WIDE), self.pick(&WIDE));
        let (d32, s32, s8) = (self.pick(&HALF), self.pick(&HALF), self.pick(&LOW));
        let (m, n) = (self.memory(), self.immediate());
        let count = self.random.below(64) as u32;
        let most = if stack { 26 } else { 24 };
        let choice = self.random.below(most);
        let a = &mut self.a;
        match choice {
            0 => a.mov(d, s),
            1 => a.mov(d32, s32),
            2 => a.mov(d32, n),
            3 => a.mov(d, qword_ptr(m)),
            4 => a.mov(d32, dword_ptr(m)),
            5 => a.mov(qword_ptr(m), s),
            6 => a.mov(dword_ptr(m), s32),
            7 => a.lea(d, qword_ptr(m)),
            8 => a.movzx(d32, s8),
            9 => a.movzx(d32, byte_ptr(m)),
            10 => a.add(d, s),
            11 => a.add(d32, s32),
            12 => a.xor(d, s),
            13 => a.xor(d32, s32),
            14 => a.and(d, s),
            15 => a.add(d, n),
            16 => a.sub(d, n),
            17 => a.and(d32, n),
            18 => a.and(d, n),
            19 => a.shl(d, count),
            20 => a.shr(d, count),
            21 => a.shr(d32, count),
            22 => a.adc(d, s),
            23 => a.sete(s8),
            24 => a.push(s),
            _ => a.pop(d),
        }
    }

    /// A comparison that is no part of its branch's op.
    fn comparison(&mut self) -> Result<(), IcedError> {
        let (d, d32, d8) = (self.pick(&WIDE), self.pick(&HALF), self.pick(&LOW));
        let (m, n) = (self.memory(), self.immediate());
        let choice = self.random.below(9);
        let a = &mut self.a;
        match choice {
            0 => a.cmp(byte_ptr(m), i32::from(n as i8)),
            1 => a.cmp(dword_ptr(m), n),
            2 => a.cmp(qword_ptr(m), n),
            3 => a.test(byte_ptr(m), i32::from(n as i8)),
            4 => a.cmp(d32, dword_ptr(m)),
            5 => a.cmp(d, qword_ptr(m)),
            6 => a.cmp(d8, i32::from(n as i8)),
            7 => a.test(d8, d8),
            _ => a.test(d8, i32::from(n as i8)),
        }
    }

    /// A comparison that makes one op with its branch.
    fn fused(&mut self) -> Result<(), IcedError> {
        let (d, s, d32, s32) = (
            self.pick(&WIDE),
            self.pick(&WIDE),
            self.pick(&HALF),
            self.pick(&HALF),
        );
        let n = i32::from(self.immediate() as i16);
        let choice = self.random.below(5);
        let a = &mut self.a;
        match choice {
            0 => a.test(d, d),
            1 => a.test(d32, d32),
            2 => a.cmp(d, s),
            3 => a.cmp(d32, s32),
            _ => a.cmp(d32, n),
        }
    }

    fn branch(&mut self, to: CodeLabel) -> Result<(), IcedError> {
        let choice = self.random.below(8);
        let a = &mut self.a;
        match choice {
            0 => a.jb(to),
            1 => a.jae(to),
            2 => a.je(to),
            3 => a.jne(to),
            4 => a.jbe(to),
            5 => a.ja(to),
            6 => a.jmp(to),
            _ => a.jl(to),
        }
    }

    /// Some instructions, and a branch over one, or a call.
    fn piece(&mut self, function: CodeLabel) -> Result<(), IcedError> {
        for _ in 0..self.random.below(6) {
            self.body(true)?;
        }
        match self.random.below(4) {
            0 => return self.a.call(function),
            1 => self.comparison()?,
            2 => self.fused()?,
            _ => {}
        }
        let mut over = self.a.create_label();
        self.branch(over)?;
        self.body(true)?;
        self.a.set_label(&mut over)?;
        self.body(true)
    }
}

fn program(seed: u64) -> Result<Vec<u8>, IcedError> {
    let mut writer = Writer {
        a: CodeAssembler::new(64)?,
        random: Random(seed),
    };
    let mut function = writer.a.create_label();
    for _ in 0..12 {
        writer.piece(function)?;
    }
    writer.a.hlt()?;
    writer.a.set_label(&mut function)?;
    for _ in 0..3 {
        writer.body(false)?;
    }
    writer.a.ret()?;
    writer.a.assemble(CODE)
}

/// The end of a program: registers, instructions, memory.
fn end(code: &[u8], seed: u64, dispatch: Dispatch, slice: u64) -> (Registers, u64, Vec<u8>) {
    // Whatever faults ends in HLT.
    let (mut cpu, ram) = machine(code, &[0xf4]);
    cpu.set_dispatch(dispatch);
    let mut random = Random(seed);
    let mut registers = cpu.registers();
    for n in [0, 1, 2, 6, 7, 8, 9, 10] {
        registers.gpr[n] = random.edge();
    }
    (registers.gpr[3], registers.gpr[5], registers.gpr[15]) = (DATA, EDGE, NEAR_CODE);
    cpu.set_registers(&registers);
    for at in (DATA..DATA + 64).step_by(8) {
        ram.write_u64(at, random.edge());
    }
    while cpu.retired() < 1000 {
        if cpu.run(slice) == Stopped::Halted {
            break;
        }
    }
    let mut memory = vec![0; MEMORY];
    ram.read(0, &mut memory);
    (cpu.registers(), cpu.retired(), memory)
}

#[test]
fn random_programs_end_the_same_with_pairs_without_them_and_in_single_instructions() {
    let mut faults = 0;
    for seed in 0..400 {
        let code = program(seed).expect("a program");
        assert!(CODE + (code.len() as u64) < NEAR_CODE);
        let (registers, retired, memory) = end(&code, seed, Dispatch::Tail, 1000);
        faults += u32::from(registers.cr2 != 0);
        for (dispatch, slice) in [
            (Dispatch::Loop, 1000),
            (Dispatch::Tail, 1),
            (Dispatch::Tail, 7),
        ] {
            let other = end(&code, seed, dispatch, slice);
            assert_eq!(registers, other.0, "seed {seed}, {dispatch:?}, {slice}");
            assert_eq!(retired, other.1, "seed {seed}, {dispatch:?}, {slice}");
            assert!(
                memory == other.2,
                "memory of seed {seed}, {dispatch:?}, {slice}"
            );
        }
    }
    // Programs end in the middle of blocks, and at their ends.
    assert!((20..380).contains(&faults), "{faults} page faults");
}

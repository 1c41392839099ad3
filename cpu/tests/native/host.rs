//! Runs one instruction natively, with given registers, and catches its faults.

use std::cell::Cell;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

use iced_x86::code_asm::*;

/// Registers before and after an instruction.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Registers {
    pub gpr: [u64; 16],
    pub flags: u64,
    pub pad: [u64; 7],
    /// From here on as XSAVE lays it out.
    pub control: u16,
    pub status: u16,
    pub tags: u8,
    pub reserved: u8,
    pub opcode: u16,
    pub pointers: [u64; 2],
    pub mxcsr: u32,
    pub mxcsr_mask: u32,
    pub st: [[u64; 2]; 8],
    pub xmm: [[u64; 2]; 16],
    pub unused: [u64; 12],
    pub header: [u64; 8],
    /// Upper halves of YMM registers.
    pub high: [[u64; 2]; 16],
}

impl Registers {
    pub(crate) const fn zero() -> Self {
        Self {
            gpr: [0; 16],
            flags: 2,
            pad: [0; 7],
            control: 0x37f,
            status: 0,
            tags: 0,
            reserved: 0,
            opcode: 0,
            pointers: [0; 2],
            mxcsr: 0x1f80,
            mxcsr_mask: 0,
            st: [[0; 2]; 8],
            xmm: [[0; 2]; 16],
            unused: [0; 12],
            header: [7, 0, 0, 0, 0, 0, 0, 0],
            high: [[0; 2]; 16],
        }
    }

    /// The extended state as XSAVE lays it out.
    pub(crate) fn extended(&mut self) -> &mut [u8; 832] {
        let start = (&raw mut self.control).cast();
        // SAFETY: 832 bytes without padding follow in this `repr(C)` structure of integers.
        unsafe { &mut *start }
    }
}

const _: () = assert!(std::mem::offset_of!(Registers, control) as u64 == EXTENDED);
const _: () = assert!(std::mem::offset_of!(Registers, high) as u64 == EXTENDED + 576);
const EXTENDED: u64 = 192;

/// Components of the extended state that the host has of x87, SSE and AVX.
pub(crate) fn components() -> u32 {
    let avx = std::is_x86_feature_detected!("avx");
    if avx { 7 } else { 3 }
}

const CODE: u64 = 0x1000;
/// Offset of the data in the arena.
pub(crate) const DATA: u64 = 0x4000;
pub(crate) const DATA_LEN: u64 = 0x3000;
pub(crate) const ARENA: u64 = DATA + DATA_LEN;
const STATE: u64 = 0x100;
const SLOT_RSP: u64 = 8;
const SLOT_MXCSR: u64 = 16;

/// Memory below 2 GiB with a thunk, a copy of the registers, and data.
pub(crate) struct Native {
    pub base: u64,
    epilogue: u64,
}

thread_local! {
    static EPILOGUE: Cell<u64> = const { Cell::new(0) };
    static SIGNAL: Cell<i32> = const { Cell::new(0) };
}

extern "C" fn on_signal(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    SIGNAL.set(signal);
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: the kernel passes the interrupted context, which SA_SIGINFO handlers may change.
    // Faults come from the thunk alone while EPILOGUE is set.
    unsafe {
        if EPILOGUE.get() == 0 {
            libc::abort();
        }
        (*context).uc_mcontext.gregs[libc::REG_RIP as usize] = EPILOGUE.get() as i64;
    }
}

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for signal in [
            libc::SIGFPE,
            libc::SIGILL,
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGTRAP,
        ] {
            // SAFETY: a zeroed sigaction is valid, and the handler only changes thread-locals and
            // the context.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = on_signal as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
            }
        }
    });
    let stack = Box::leak(vec![0u8; 128 << 10].into_boxed_slice());
    let alternate = libc::stack_t {
        ss_sp: stack.as_mut_ptr().cast(),
        ss_flags: 0,
        ss_size: stack.len(),
    };
    // SAFETY: the stack is leaked, so it lives as long as the thread.
    let set = unsafe { libc::sigaltstack(&alternate, std::ptr::null_mut()) };
    assert_eq!(set, 0);
}

impl Native {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0x2000_0000);
        install();
        let base = NEXT.fetch_add(0x10_0000, Ordering::SeqCst);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let rights = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        // SAFETY: a fresh anonymous mapping that replaces nothing.
        let got = unsafe { libc::mmap(base as *mut _, ARENA as usize, rights, flags, -1, 0) };
        assert_eq!(got as u64, base, "an arena below 2 GiB");
        Self { base, epilogue: 0 }
    }

    /// Address of the instruction in the thunk; the emulated one runs there too.
    pub(crate) fn code(&self) -> u64 {
        self.base + CODE + 0x800
    }

    /// Places an instruction (its bytes, encoded for [`Native::code`]) between prologue and
    /// epilogue.
    pub(crate) fn place(&mut self, bytes: &[u8]) {
        let prologue = self.prologue().expect("assembles");
        self.poke(CODE, &prologue);
        self.poke(CODE + 0x800, bytes);
        self.epilogue = self.code() + bytes.len() as u64;
        let epilogue = self.restore(self.epilogue).expect("assembles");
        self.poke(self.epilogue - self.base, &epilogue);
    }

    fn poke(&mut self, offset: u64, bytes: &[u8]) {
        assert!(offset + bytes.len() as u64 <= ARENA);
        // SAFETY: inside of the arena, which only this value uses.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                (self.base + offset) as *mut u8,
                bytes.len(),
            );
        }
    }

    fn prologue(&self) -> Result<Vec<u8>, IcedError> {
        let mut a = CodeAssembler::new(64)?;
        let state = self.base + STATE;
        for r in [rbx, rbp, r12, r13, r14, r15] {
            a.push(r)?;
        }
        a.mov(qword_ptr(self.base + SLOT_RSP), rsp)?;
        a.stmxcsr(dword_ptr(self.base + SLOT_MXCSR))?;
        a.mov(eax, components())?;
        a.xor(edx, edx)?;
        a.xrstor64(ptr(state + EXTENDED))?;
        a.push(qword_ptr(state + 128))?;
        a.popfq()?;
        for (i, r) in GPR.into_iter().enumerate() {
            a.mov(r, qword_ptr(state + 8 * i as u64))?;
        }
        a.jmp(self.code())?;
        a.assemble(self.base + CODE)
    }

    fn restore(&self, at: u64) -> Result<Vec<u8>, IcedError> {
        let mut a = CodeAssembler::new(64)?;
        let state = self.base + STATE;
        for (i, r) in GPR.into_iter().enumerate() {
            a.mov(qword_ptr(state + 8 * i as u64), r)?;
        }
        a.mov(rsp, qword_ptr(self.base + SLOT_RSP))?;
        a.pushfq()?;
        a.pop(qword_ptr(state + 128))?;
        a.cld()?;
        a.mov(eax, components())?;
        a.xor(edx, edx)?;
        a.xsave64(ptr(state + EXTENDED))?;
        a.fninit()?;
        if components() & 4 != 0 {
            a.vzeroupper()?;
        }
        a.ldmxcsr(dword_ptr(self.base + SLOT_MXCSR))?;
        for r in [r15, r14, r13, r12, rbp, rbx] {
            a.pop(r)?;
        }
        a.ret()?;
        a.assemble(at)
    }

    /// Runs the placed instruction on `registers`; returns the signal it raised, or 0.
    pub(crate) fn run(&mut self, registers: &mut Registers) -> i32 {
        let state = (self.base + STATE) as *mut Registers;
        SIGNAL.set(0);
        EPILOGUE.set(self.epilogue);
        // SAFETY: the thunk follows the C calling convention: it saves what a callee must save,
        // restores RSP, MXCSR and DF, and the placed instruction reaches memory in the arena only
        // (or faults, which leads to the epilogue). STATE is aligned for `Registers`.
        unsafe {
            state.write(*registers);
            let thunk: extern "C" fn() = std::mem::transmute(self.base + CODE);
            thunk();
            *registers = state.read();
        }
        EPILOGUE.set(0);
        SIGNAL.get()
    }

    /// The data that instructions reach.
    pub(crate) fn data(&mut self) -> &mut [u8] {
        // SAFETY: the arena's data pages; exclusive as `self` is.
        unsafe { std::slice::from_raw_parts_mut((self.base + DATA) as *mut u8, DATA_LEN as usize) }
    }
}

const GPR: [AsmRegister64; 16] = [
    rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15,
];

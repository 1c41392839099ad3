//! From a decoded instruction to the handler of its form.

use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

use crate::alu;
use crate::exec::data::condition_number;
use crate::fast::*;
use crate::op::{Handlers, Op};
use crate::operand::{gpr, operand_size};
use crate::state::BLOCK;

/// Picks a constant size.
macro_rules! sized {
    ($size:expr, $S:ident => $e:expr) => {
        match $size {
            1 => {
                const $S: usize = 1;
                $e
            }
            2 => {
                const $S: usize = 2;
                $e
            }
            4 => {
                const $S: usize = 4;
                $e
            }
            _ => {
                const $S: usize = 8;
                $e
            }
        }
    };
}

/// Picks a constant out of a list.
macro_rules! constant {
    ($value:expr, $C:ident in [$($n:literal)*] => $e:expr) => {
        match $value {
            $($n => {
                const $C: u8 = $n;
                $e
            })*
            _ => return None,
        }
    };
}

/// An op without memory operand and immediate.
pub(crate) fn blank(h: Handlers, dispatch: crate::op::Dispatch) -> Op {
    Op {
        run: h.get(dispatch),
        imm: 0,
        disp: 0,
        dst: 16,
        src: 16,
        base: 16,
        index: 16,
        scale: 0,
        seg: 7,
        left: 0,
        len: 0,
        offset: 0,
        kind: h.kind,
    }
}

/// Number of a register operand that handlers can use: no high bytes.
pub(crate) fn plain(i: &Instruction, n: u32) -> Option<u8> {
    if i.op_kind(n) != OpKind::Register {
        return None;
    }
    gpr(i.op_register(n))
        .filter(|g| !g.high)
        .map(|g| g.number as u8)
}

fn is_immediate(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    )
}

/// Fields that a form fills in.
#[derive(Clone, Copy)]
pub(crate) struct Form {
    pub(crate) handlers: Handlers,
    pub(crate) dst: u8,
    pub(crate) src: u8,
    pub(crate) imm: u64,
    pub(crate) memory: bool,
}

pub(crate) fn form(handlers: Handlers) -> Form {
    Form {
        handlers,
        dst: 16,
        src: 16,
        imm: 0,
        memory: false,
    }
}

/// Operation number of two-operand arithmetic.
pub(crate) fn alu_op(m: M) -> Option<u8> {
    Some(match m {
        M::Add => alu::ADD,
        M::Or => alu::OR,
        M::Adc => alu::ADC,
        M::Sbb => alu::SBB,
        M::And => alu::AND,
        M::Sub => alu::SUB,
        M::Xor => alu::XOR,
        M::Cmp => alu::CMP,
        M::Test => alu::TEST,
        _ => return None,
    })
}

/// The form of an instruction that does not end a block. `None`: it is run from its decoded form.
pub(crate) fn body(i: &Instruction) -> Option<Form> {
    let m = i.mnemonic();
    if let Some(op) = alu_op(m) {
        return arithmetic(i, op);
    }
    if let Some(form) = crate::bits::select(i) {
        return Some(form);
    }
    match m {
        M::Mov => mov(i),
        M::Movzx => extend(i, false),
        M::Movsx | M::Movsxd => extend(i, true),
        M::Lea => lea(i),
        M::Inc => unary(i, INC),
        M::Dec => unary(i, DEC),
        M::Neg => unary(i, NEG),
        M::Not => unary(i, NOT),
        M::Rol => shift(i, alu::ROL),
        M::Ror => shift(i, alu::ROR),
        M::Shl | M::Sal => shift(i, alu::SHL),
        M::Shr => shift(i, alu::SHR),
        M::Sar => shift(i, alu::SAR),
        M::Imul if i.op_count() == 2 => imul(i),
        M::Push if i.code() == iced_x86::Code::Push_r64 => Some(Form {
            src: plain(i, 0)?,
            ..form(Handlers::of::<Push>())
        }),
        M::Pop if i.code() == iced_x86::Code::Pop_r64 => Some(Form {
            dst: plain(i, 0)?,
            ..form(Handlers::of::<Pop>())
        }),
        M::Nop | M::Endbr64 | M::Endbr32 => Some(form(Handlers::of::<Nop>())),
        _ => conditional(i),
    }
}

fn arithmetic(i: &Instruction, op: u8) -> Option<Form> {
    let size = operand_size(i, 0);
    let (k0, k1) = (i.op_kind(0), i.op_kind(1));
    let imm = || crate::flags::zero(i.immediate(1), size);
    macro_rules! handlers {
        ($H:ident) => {
            constant!(op, O in [0 1 2 3 4 5 6 7 8] => sized!(size, S => Handlers::of::<$H<O, S>>()))
        };
    }
    Some(match (k0, k1) {
        (OpKind::Register, OpKind::Register) => Form {
            dst: plain(i, 0)?,
            src: plain(i, 1)?,
            ..form(handlers!(AluRR))
        },
        (OpKind::Register, OpKind::Memory) => Form {
            dst: plain(i, 0)?,
            memory: true,
            ..form(handlers!(AluRM))
        },
        (OpKind::Memory, OpKind::Register) => Form {
            src: plain(i, 1)?,
            memory: true,
            ..form(handlers!(AluMR))
        },
        (OpKind::Register, k) if is_immediate(k) => Form {
            dst: plain(i, 0)?,
            imm: imm(),
            ..form(handlers!(AluRI))
        },
        (OpKind::Memory, k) if is_immediate(k) => Form {
            imm: imm(),
            memory: true,
            ..form(handlers!(AluMI))
        },
        _ => return None,
    })
}

fn mov(i: &Instruction) -> Option<Form> {
    let size = operand_size(i, 0);
    let (k0, k1) = (i.op_kind(0), i.op_kind(1));
    Some(match (k0, k1) {
        (OpKind::Register, OpKind::Register) => {
            let h = sized!(size, S => Handlers::of::<MovRR<S>>());
            Form {
                dst: plain(i, 0)?,
                src: plain(i, 1)?,
                ..form(h)
            }
        }
        (OpKind::Register, OpKind::Memory) => {
            let h = sized!(size, S => Handlers::of::<Load<S>>());
            Form {
                dst: plain(i, 0)?,
                memory: true,
                ..form(h)
            }
        }
        (OpKind::Memory, OpKind::Register) => {
            let h = sized!(size, S => Handlers::of::<Store<S>>());
            Form {
                src: plain(i, 1)?,
                memory: true,
                ..form(h)
            }
        }
        (OpKind::Register, k) if is_immediate(k) => {
            let h = sized!(size, S => Handlers::of::<MovRI<S>>());
            Form {
                dst: plain(i, 0)?,
                imm: i.immediate(1),
                ..form(h)
            }
        }
        (OpKind::Memory, k) if is_immediate(k) => {
            let h = sized!(size, S => Handlers::of::<StoreImm<S>>());
            Form {
                imm: i.immediate(1),
                memory: true,
                ..form(h)
            }
        }
        _ => return None,
    })
}

fn extend(i: &Instruction, signed: bool) -> Option<Form> {
    let (from, to) = (operand_size(i, 1), operand_size(i, 0));
    macro_rules! handlers {
        ($H:ident) => {
            match (from, to, signed) {
                (1, 4, false) => Handlers::of::<$H<1, 4, false>>(),
                (1, 8, false) => Handlers::of::<$H<1, 8, false>>(),
                (2, 4, false) => Handlers::of::<$H<2, 4, false>>(),
                (2, 8, false) => Handlers::of::<$H<2, 8, false>>(),
                (1, 4, true) => Handlers::of::<$H<1, 4, true>>(),
                (1, 8, true) => Handlers::of::<$H<1, 8, true>>(),
                (2, 4, true) => Handlers::of::<$H<2, 4, true>>(),
                (2, 8, true) => Handlers::of::<$H<2, 8, true>>(),
                (4, 8, true) => Handlers::of::<$H<4, 8, true>>(),
                _ => return None,
            }
        };
    }
    Some(if i.op_kind(1) == OpKind::Memory {
        Form {
            dst: plain(i, 0)?,
            memory: true,
            ..form(handlers!(ExtendM))
        }
    } else {
        Form {
            dst: plain(i, 0)?,
            src: plain(i, 1)?,
            ..form(handlers!(ExtendR))
        }
    })
}

fn lea(i: &Instruction) -> Option<Form> {
    let h = match operand_size(i, 0) {
        4 => Handlers::of::<Lea<4>>(),
        8 => Handlers::of::<Lea<8>>(),
        _ => return None,
    };
    Some(Form {
        dst: plain(i, 0)?,
        memory: true,
        ..form(h)
    })
}

fn unary(i: &Instruction, op: u8) -> Option<Form> {
    let size = operand_size(i, 0);
    if i.op_kind(0) == OpKind::Memory {
        let h = constant!(op, O in [0 1 2 3] => sized!(size, S => Handlers::of::<UnaryM<O, S>>()));
        return Some(Form {
            memory: true,
            ..form(h)
        });
    }
    let dst = plain(i, 0)?;
    let h = constant!(op, O in [0 1 2 3] => sized!(size, S => Handlers::of::<Unary<O, S>>()));
    Some(Form { dst, ..form(h) })
}

fn shift(i: &Instruction, op: u8) -> Option<Form> {
    let size = operand_size(i, 0);
    let dst = plain(i, 0)?;
    if !is_immediate(i.op_kind(1)) {
        // The only register that counts is CL.
        let h =
            constant!(op, O in [0 1 4 5 7] => sized!(size, S => Handlers::of::<ShiftRC<O, S>>()));
        return Some(Form { dst, ..form(h) });
    }
    let count = i.immediate(1) & if size == 8 { 63 } else { 31 };
    if count == 0 && size != 4 {
        return Some(form(Handlers::of::<Nop>()));
    }
    let h = constant!(op, O in [0 1 4 5 7] => sized!(size, S => Handlers::of::<ShiftRI<O, S>>()));
    Some(Form {
        dst,
        imm: count,
        ..form(h)
    })
}

fn imul(i: &Instruction) -> Option<Form> {
    let size = operand_size(i, 0);
    Some(if i.op_kind(1) == OpKind::Memory {
        let h = sized!(size, S => Handlers::of::<ImulRM<S>>());
        Form {
            dst: plain(i, 0)?,
            memory: true,
            ..form(h)
        }
    } else {
        let h = sized!(size, S => Handlers::of::<ImulRR<S>>());
        Form {
            dst: plain(i, 0)?,
            src: plain(i, 1)?,
            ..form(h)
        }
    })
}

fn conditional(i: &Instruction) -> Option<Form> {
    use iced_x86::ConditionCode;
    if i.condition_code() == ConditionCode::None || i.op_count() == 0 {
        return None;
    }
    let cc = condition_number(i);
    let dst = plain(i, 0)?;
    if i.op_count() == 1 {
        let h = constant!(cc, CC in [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15] => Handlers::of::<SetR<CC>>());
        return Some(Form { dst, ..form(h) });
    }
    let size = operand_size(i, 0);
    if i.op_kind(1) == OpKind::Memory {
        let h = constant!(cc, CC in [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15] => {
            if size == 8 { Handlers::of::<CmovRM<CC, 8>>() } else { Handlers::of::<CmovRM<CC, 4>>() }
        });
        return (size >= 4).then_some(Form {
            dst,
            memory: true,
            ..form(h)
        });
    }
    let src = plain(i, 1)?;
    let h = constant!(cc, CC in [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15] => {
        if size == 8 { Handlers::of::<CmovRR<CC, 8>>() } else { Handlers::of::<CmovRR<CC, 4>>() }
    });
    (size >= 4).then_some(Form {
        dst,
        src,
        ..form(h)
    })
}

/// Fills the memory operand of a 64-bit address into `op`; false if it needs the decoded form.
pub(crate) fn memory(i: &Instruction, op: &mut Op, block: u64) -> bool {
    let (base, index) = (i.memory_base(), i.memory_index());
    let displacement = i.memory_displacement64();
    let wide = |r: Register| r == Register::None || r.is_gpr64();
    if !wide(index) {
        return false;
    }
    let relative = if base == Register::RIP {
        op.base = BLOCK as u8;
        displacement.wrapping_sub(block)
    } else if base == Register::None {
        if index == Register::None && i.memory_displ_size() != 8 {
            return false;
        }
        displacement
    } else if wide(base) {
        op.base = base.number() as u8;
        displacement
    } else {
        return false;
    };
    let Ok(disp) = i32::try_from(relative as i64) else {
        return false;
    };
    op.disp = disp;
    if index != Register::None {
        op.index = index.number() as u8;
        op.scale = i.memory_index_scale().trailing_zeros() as u8;
    }
    op.seg = if i.mnemonic() == M::Lea {
        7
    } else {
        crate::operand::segment_number(i.memory_segment()) as u8
    };
    true
}

/// Handler of Jcc.
pub(crate) fn jcc(cc: u8) -> Option<Handlers> {
    Some(constant!(cc, CC in [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15] => Handlers::end::<Jcc<CC>>()))
}

/// Handler that joins CMP or TEST, already in `first`, with the branch that follows.
pub(crate) fn fused(i: &Instruction, cc: u8) -> Option<(Handlers, Form, i16)> {
    let size = operand_size(i, 0);
    let op = alu_op(i.mnemonic())?;
    if op < alu::CMP || size < 4 {
        return None;
    }
    let dst = plain(i, 0)?;
    macro_rules! handlers {
        ($H:ident) => {
            constant!(op, O in [7 8] => constant!(cc, CC in [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15] => {
                if size == 8 { Handlers::end::<$H<O, CC, 8>>() } else { Handlers::end::<$H<O, CC, 4>>() }
            }))
        };
    }
    if let Some(src) = plain(i, 1) {
        let h = handlers!(FusedRR);
        return Some((
            h,
            Form {
                dst,
                src,
                ..form(h)
            },
            0,
        ));
    }
    if !is_immediate(i.op_kind(1)) {
        return None;
    }
    let imm = crate::flags::sign(i.immediate(1), size) as i64;
    let small = i16::try_from(imm).ok()?;
    let h = handlers!(FusedRI);
    Some((h, Form { dst, ..form(h) }, small))
}

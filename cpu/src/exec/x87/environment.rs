//! Control, status, and the state as FNSTENV and FNSAVE write it.

use iced_x86::{Instruction, Mnemonic as M};

use super::wait;
use crate::exec::Exec;
use crate::fpu::Fpu;
use crate::paging::{READ, WRITE};
use crate::state::{Core, R};
use crate::x87::number::{Kind, is_denormal, kind};

pub(super) fn select(m: M) -> Option<Exec> {
    Some(match m {
        M::Fninit => |c, _| {
            c.x87()?;
            c.fpu.initialize();
            Ok(())
        },
        M::Fnclex => |c, _| {
            c.x87()?;
            c.fpu.status &= 0x7f00;
            Ok(())
        },
        // What the 8087 and the 80287 needed.
        M::Fneni | M::Fndisi | M::Fnsetpm => |c, _| c.x87(),
        M::Fnstcw => |c, i| {
            c.x87()?;
            let v = c.fpu.control;
            c.put(i, 0, v.into())
        },
        M::Fnstsw => |c, i| {
            c.x87()?;
            let v = c.fpu.status;
            c.put(i, 0, v.into())
        },
        M::Fldcw => |c, i| {
            c.x87_wait()?;
            c.fpu.control = c.get(i, 0)? as u16 & 0x1f3f | 0x40;
            c.fpu.summarize();
            Ok(())
        },
        M::Wait => wait,
        M::Fnstenv => store_environment,
        M::Fldenv => load_environment,
        M::Fnsave => save,
        M::Frstor => restore,
        _ => return None,
    })
}

/// Bytes of the environment with 32 bits (it has half as many with 16), and behind it of a register.
const WIDE: usize = 28;
const REGISTER: usize = 10;
const MOST: usize = WIDE + 8 * REGISTER;

impl Fpu {
    fn initialize(&mut self) {
        (self.control, self.status, self.tags) = (0x37f, 0, 0);
        (self.opcode, self.instruction, self.operand) = (0, 0, 0);
    }

    /// Two bits for each register: 0 valid, 1 zero, 2 special, 3 empty.
    fn tag_word(&self) -> u16 {
        (0..8).fold(0, |word, n| {
            let tag = if self.tags >> n & 1 == 0 {
                3
            } else {
                match kind(self.st[n]) {
                    Kind::Zero => 1,
                    Kind::Finite(_) if !is_denormal(self.st[n]) => 0,
                    _ => 2,
                }
            };
            word | tag << (2 * n)
        })
    }

    fn set_tag_word(&mut self, word: u16) {
        self.tags = (0..8).fold(0, |tags, n| tags | u8::from(word >> (2 * n) & 3 != 3) << n);
    }
}

impl Core {
    /// The environment as it lies in memory: in real mode addresses are linear and the opcode is in their upper
    /// part, else there is room for selectors, which are zero (CPUID says so).
    fn environment(&self, size: usize) -> [u8; WIDE] {
        let f = &self.fpu;
        let real = self.paragraphs();
        let (ip, dp) = (f.instruction as u32, f.operand as u32);
        let mut words = [
            u32::from(f.control),
            u32::from(f.status),
            u32::from(f.tag_word()),
            ip,
            u32::from(f.opcode) << 16,
            dp,
            0,
        ];
        let wide = size == WIDE;
        if real {
            words[3] = ip & 0xffff;
            words[4] = ip >> 16 << 12 | u32::from(f.opcode);
            words[5] = dp & 0xffff;
            words[6] = dp >> 16 << 12;
        } else if !wide {
            words[4] = 0;
        }
        let mut bytes = [0; WIDE];
        for (n, word) in words.into_iter().enumerate() {
            if wide {
                // The upper halves of the first three are reserved ones.
                let reserved = if n < 3 { 0xffff_0000 } else { 0 };
                bytes[n * 4..][..4].copy_from_slice(&(word | reserved).to_le_bytes());
            } else {
                bytes[n * 2..][..2].copy_from_slice(&(word as u16).to_le_bytes());
            }
        }
        bytes
    }

    fn set_environment(&mut self, bytes: &[u8], size: usize) {
        let wide = size == WIDE;
        let word = |n: usize| {
            if wide {
                let at = n * 4;
                u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
            } else {
                u32::from(u16::from_le_bytes([bytes[n * 2], bytes[n * 2 + 1]]))
            }
        };
        let real = self.paragraphs();
        let f = &mut self.fpu;
        f.control = word(0) as u16 & 0x1f3f | 0x40;
        f.status = word(1) as u16;
        f.set_tag_word(word(2) as u16);
        if real {
            f.instruction = u64::from(word(3) & 0xffff | word(4) >> 12 << 16);
            f.operand = u64::from(word(5) & 0xffff | word(6) >> 12 << 16);
            f.opcode = word(4) as u16 & 0x7ff;
        } else {
            (f.instruction, f.operand) = (word(3).into(), word(5).into());
            f.opcode = if wide {
                (word(4) >> 16) as u16 & 0x7ff
            } else {
                0
            };
        }
        f.summarize();
    }

    fn environment_at(&mut self, i: &Instruction, write: bool) -> R<(usize, u64, usize)> {
        let seg = Self::operand_segment(i);
        let size = i.memory_size().size();
        let offset = self.offset(i);
        let at = self.linear(seg, offset, size as u64, write)?;
        Ok((seg, at, size))
    }
}

fn store_environment(c: &mut Core, i: &Instruction) -> R<()> {
    c.x87()?;
    let (seg, at, size) = c.environment_at(i, true)?;
    let bytes = c.environment(size);
    c.write_linear(seg, at, &bytes[..size], WRITE)?;
    c.fpu.control |= 0x3f;
    c.fpu.summarize();
    Ok(())
}

fn load_environment(c: &mut Core, i: &Instruction) -> R<()> {
    c.x87_wait()?;
    let (seg, at, size) = c.environment_at(i, false)?;
    let mut bytes = [0; WIDE];
    c.read_linear(seg, at, &mut bytes[..size], READ)?;
    c.set_environment(&bytes, size);
    Ok(())
}

fn save(c: &mut Core, i: &Instruction) -> R<()> {
    c.x87()?;
    let (seg, at, size) = c.environment_at(i, true)?;
    let head = size - 8 * REGISTER;
    let mut bytes = [0; MOST];
    bytes[..head].copy_from_slice(&c.environment(head)[..head]);
    for n in 0..8 {
        let register = c.fpu.st(n).to_le_bytes();
        bytes[head + n * REGISTER..][..REGISTER].copy_from_slice(&register[..REGISTER]);
    }
    c.write_linear(seg, at, &bytes[..size], WRITE)?;
    c.fpu.initialize();
    Ok(())
}

fn restore(c: &mut Core, i: &Instruction) -> R<()> {
    c.x87_wait()?;
    let (seg, at, size) = c.environment_at(i, false)?;
    let head = size - 8 * REGISTER;
    let mut bytes = [0; MOST];
    c.read_linear(seg, at, &mut bytes[..size], READ)?;
    c.set_environment(&bytes[..head], head);
    for n in 0..8 {
        let mut register = [0; 16];
        register[..REGISTER].copy_from_slice(&bytes[head + n * REGISTER..][..REGISTER]);
        let at = c.fpu.physical(n);
        c.fpu.st[at] = u128::from_le_bytes(register);
    }
    Ok(())
}

//! Building of blocks: fetch, decode, choose handlers.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::cell::Cell;

use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, FlowControl, Instruction};

use crate::bus::Access;
use crate::exec::{self, Exec};
use crate::fast;
use crate::op::{BLOCK_OPS, Decoded, DecodedEnd, Dispatch, Fall, Handlers, Locked, Op, Out};
use crate::paging::FETCH;
use crate::pair;
use crate::parallel::is_locked;
use crate::physical::Place;
use crate::segment::CS;
use crate::select;
use crate::state::{CR0_PG, Core, R};

/// Bytes fetched for a block at most.
const WINDOW: usize = 512;
/// Longest instruction.
const LONGEST: usize = 15;

/// Block that a direct branch last led to, and the epoch of that.
#[derive(Clone, Copy, Default)]
pub(crate) struct Link {
    pub(crate) epoch: u64,
    pub(crate) block: u32,
}

/// Decoded instructions that run one after the other. What each run of it needs is in one line of the cache.
#[repr(C, align(64))]
pub(crate) struct Block {
    pub(crate) ops: Box<[Op]>,
    /// Links for [`Out::Taken`] and [`Out::Fall`].
    links: [Cell<Link>; 2],
    /// Instructions.
    pub(crate) count: u8,
    /// False if the block may not be kept.
    pub(crate) keep: bool,
    /// Version of the page's code when the block was built.
    pub(crate) version: u32,
    /// RIP, to know when a link stays inside of the page.
    pub(crate) rip: u64,
    pub(crate) gpa: u64,
    /// The bytes that were decoded, and the last time that they were compared with memory.
    pub(crate) code: Box<[u8]>,
    pub(crate) trust: u64,
}

impl Block {
    /// The link of a way out that has a fixed target.
    #[inline(always)]
    pub(crate) fn link(&self, out: Out) -> Option<&Cell<Link>> {
        match out {
            Out::Taken => Some(&self.links[0]),
            Out::Fall => Some(&self.links[1]),
            _ => None,
        }
    }
}

/// Wishes for one block.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) instructions: u8,
    pub(crate) keep: bool,
    pub(crate) dispatch: Dispatch,
}

struct Bytes {
    data: [u8; WINDOW + LONGEST],
    len: usize,
    /// The page ends where the bytes end.
    to_page_end: bool,
    cacheable: bool,
}

impl Core {
    /// Linear address of an instruction.
    pub(crate) fn code_linear(&self, rip: u64) -> u64 {
        if self.bits == 64 {
            rip
        } else {
            self.seg[CS].base.wrapping_add(rip) & 0xffff_ffff
        }
    }

    /// Guest-physical address from which a linear address is fetched.
    pub(crate) fn fetch_address(&mut self, linear: u64) -> R<u64> {
        let user = self.cpl == 3;
        if let Some(gpa) = self.fetches.get(linear, user) {
            return Ok(gpa);
        }
        if self.long_mode() && self.cr0 & CR0_PG != 0 && !self.canonical(linear) {
            return Err(self.gp(0));
        }
        let walked = self.walk(linear, FETCH)?;
        self.fetches.fill(linear, user, walked.gpa);
        Ok(walked.gpa)
    }

    fn fetch_place(&mut self, gpa: u64, linear: u64) -> R<Place> {
        let access = Access {
            write: false,
            execute: true,
            walk: false,
            wide: self.has_wide_entries(),
        };
        self.place(gpa, access, Some(linear))
    }

    fn fetch(&mut self, linear: u64, gpa: u64) -> R<Bytes> {
        let mut b = Bytes {
            data: [0; WINDOW + LONGEST],
            len: 0,
            to_page_end: false,
            cacheable: true,
        };
        let place = self.fetch_place(gpa, linear)?;
        let room = 4096 - (gpa as usize & 0xfff);
        match place {
            Place::Host { .. } => {
                b.len = room.min(WINDOW);
                b.to_page_end = b.len == room;
                self.copy_out(place, gpa, &mut b.data[..b.len]);
            }
            _ => {
                // Devices are read byte by byte and their code is not kept.
                b.cacheable = false;
                b.len = room.min(LONGEST);
                b.to_page_end = b.len == room;
                for i in 0..b.len {
                    self.copy_out(place, gpa + i as u64, &mut b.data[i..i + 1]);
                }
            }
        }
        Ok(b)
    }

    /// True if memory holds these bytes of code, which lie in one page.
    pub(crate) fn code_is(&mut self, gpa: u64, linear: u64, code: &[u8]) -> R<bool> {
        let place = self.fetch_place(gpa, linear)?;
        if !matches!(place, Place::Host { .. }) {
            return Ok(false);
        }
        const PIECE: usize = 64;
        let mut now = [0; PIECE];
        Ok((gpa..)
            .step_by(PIECE)
            .zip(code.chunks(PIECE))
            .all(|(at, piece)| {
                let now = &mut now[..piece.len()];
                self.copy_out(place, at, now) && now == piece
            }))
    }

    /// Adds the beginning of the next page, for an instruction that spans two.
    fn fetch_across(&mut self, linear: u64, b: &mut Bytes) -> R<()> {
        let next = self.wrap((linear | 0xfff).wrapping_add(1));
        let gpa = self.fetch_address(next)?;
        let place = self.fetch_place(gpa, next)?;
        let len = b.len;
        self.copy_out(place, gpa, &mut b.data[len..len + LONGEST]);
        b.len += LONGEST;
        b.cacheable = false;
        Ok(())
    }

    /// Builds the block at the current RIP.
    pub(crate) fn build(&mut self, gpa: u64, limits: Limits) -> R<Block> {
        let rip = self.rip;
        let linear = self.code_linear(rip);
        let version = self.pages.version(gpa);
        let mut bytes = self.fetch(linear, gpa)?;
        let mut list = self.decode(&bytes, limits.instructions)?;
        if list.is_empty() {
            if bytes.to_page_end {
                self.fetch_across(linear, &mut bytes)?;
            }
            list = self.decode(&bytes, 1)?;
        }
        let size = list.last().map_or(0, |i| i.next_ip().wrapping_sub(rip)) as usize;
        let ops = self.translate(&list, limits.dispatch);
        let code = &bytes.data[..size.min(bytes.len)];
        let keep = limits.keep && bytes.cacheable && self.keep_code(gpa, linear, code)?;
        Ok(Block {
            ops: ops.into_boxed_slice(),
            count: list.len().max(1) as u8,
            gpa,
            version,
            code: if keep { code.into() } else { Box::default() },
            trust: 0,
            rip,
            links: [Cell::default(), Cell::default()],
            keep,
        })
    }

    /// Decodes up to `most` instructions that are complete in `bytes`.
    fn decode(&mut self, bytes: &Bytes, most: u8) -> R<Vec<Instruction>> {
        let mut list = Vec::with_capacity(16);
        let data = &bytes.data[..bytes.len];
        let bits = u32::from(self.bits);
        let mut decoder = Decoder::with_ip(bits, data, self.rip, DecoderOptions::NONE);
        let limit = if self.bits == 64 {
            u64::MAX
        } else {
            u64::from(self.seg[CS].limit)
        };
        while list.len() < usize::from(most).min(BLOCK_OPS - 1) && decoder.can_decode() {
            let i = decoder.decode();
            if decoder.last_error() == DecoderError::NoMoreBytes {
                break;
            }
            // The decoder takes the most that an instruction may have if it finds no end before.
            let too_long = i.is_invalid() && i.len() == LONGEST;
            let outside = self.bits != 64 && i.next_ip().wrapping_sub(1) > limit;
            if too_long || outside {
                if list.is_empty() {
                    return Err(self.gp(0));
                }
                break;
            }
            let ends = i.flow_control() != FlowControl::Next || exec::select(&i).ends;
            list.push(i);
            if ends {
                break;
            }
        }
        Ok(list)
    }

    fn translate(&mut self, list: &[Instruction], dispatch: Dispatch) -> Vec<Op> {
        let mut ops = Vec::with_capacity(list.len() + 1);
        let rip = self.rip;
        let mut ended = false;
        let mut n = 0;
        while n < list.len() {
            let i = &list[n];
            let left = (list.len() - n) as u8;
            let mut used = 1;
            let mut op = match (list.get(n + 1), self.bits) {
                (Some(next), 64) => match self.fuse(i, next, dispatch) {
                    Some(op) => {
                        used = 2;
                        op
                    }
                    None => self.one(i, rip, dispatch),
                },
                _ => self.one(i, rip, dispatch),
            };
            op.left = left;
            op.offset = i.ip().wrapping_sub(rip) as u16;
            op.len = i.len() as u8;
            ended = used == 2 || i.flow_control() != FlowControl::Next || exec::select(i).ends;
            ops.push(op);
            n += used;
        }
        if !ended {
            let mut op = select::blank(Handlers::end::<Fall>(), dispatch);
            op.imm = list.last().map_or(rip, Instruction::next_ip);
            op.offset = op.imm.wrapping_sub(rip) as u16;
            ops.push(op);
        }
        if dispatch == Dispatch::Tail {
            pair::join(&mut ops);
        }
        ops
    }

    /// CMP or TEST with the branch after it, if both fit in one op.
    fn fuse(&self, i: &Instruction, next: &Instruction, dispatch: Dispatch) -> Option<Op> {
        let (target, back) = self.branch(next)?;
        if !next.is_jcc_short_or_near() {
            return None;
        }
        let cc = exec::data::condition_number(next);
        let (handlers, form, small) = select::fused(i, cc)?;
        let mut op = select::blank(handlers, dispatch);
        op.dst = form.dst;
        op.src = form.src;
        [op.base, op.index] = small.to_le_bytes();
        op.imm = target;
        op.disp = back;
        Some(op)
    }

    /// Target of a direct branch in 64-bit mode that needs no check, and the distance from there
    /// to the next instruction.
    fn branch(&self, i: &Instruction) -> Option<(u64, i32)> {
        use iced_x86::OpKind::NearBranch64;
        if self.bits != 64 || i.op0_kind() != NearBranch64 {
            return None;
        }
        let target = i.near_branch_target();
        let back = i32::try_from(i.next_ip().wrapping_sub(target) as i64).ok()?;
        (self.canonical(target) && self.canonical(i.next_ip())).then_some((target, back))
    }

    fn one(&mut self, i: &Instruction, rip: u64, dispatch: Dispatch) -> Op {
        let locked = self.parallel.on && is_locked(i);
        if locked {
            return self.decoded(i, exec::select(i).exec, Handlers::of::<Locked>(), dispatch);
        }
        if let Some(op) = self.direct(i, dispatch) {
            return op;
        }
        if let Some(form) = select::body(i) {
            let mut op = select::blank(form.handlers, dispatch);
            op.dst = form.dst;
            op.src = form.src;
            op.imm = form.imm;
            if !form.memory || self.bits == 64 && select::memory(i, &mut op, rip) {
                return op;
            }
        }
        let selected = exec::select(i);
        let handlers = match (selected.ends, selected.quiet) {
            (true, false) => Handlers::end::<DecodedEnd<false>>(),
            (true, true) => Handlers::end::<DecodedEnd<true>>(),
            (false, _) => Handlers::of::<Decoded>(),
        };
        self.decoded(i, selected.exec, handlers, dispatch)
    }

    /// An op that refers to a decoded instruction.
    fn decoded(
        &mut self,
        i: &Instruction,
        exec: Exec,
        handlers: Handlers,
        dispatch: Dispatch,
    ) -> Op {
        let mut op = select::blank(handlers, dispatch);
        op.imm = self.insns.len() as u64;
        self.insns.push((exec, *i));
        op
    }

    /// Branches, calls and returns of 64-bit mode.
    fn direct(&self, i: &Instruction, dispatch: Dispatch) -> Option<Op> {
        if self.bits != 64 {
            return None;
        }
        if i.code() == Code::Retnq {
            return Some(select::blank(Handlers::end::<fast::Ret>(), dispatch));
        }
        let (target, back) = self.branch(i)?;
        let handlers = match i.code() {
            Code::Jmp_rel8_64 | Code::Jmp_rel32_64 => Handlers::end::<fast::Jmp>(),
            Code::Call_rel32_64 => Handlers::end::<fast::Call>(),
            _ if i.is_jcc_short_or_near() => select::jcc(exec::data::condition_number(i))?,
            _ => return None,
        };
        let mut op = select::blank(handlers, dispatch);
        op.imm = target;
        op.disp = back;
        Some(op)
    }
}

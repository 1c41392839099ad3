//! TDG.MEM.PAGE.ATTR.RD and TDG.MEM.PAGE.ATTR.WR

use super::super::exits::REASON_EPT_VIOLATION;
use super::super::tdcall::{Done, invalid};
use super::super::{Guest, Next, TdExit};
use crate::call::tree_gpa;
use crate::l2::alias::Aliased;
use crate::l2::{Attributes, L2Content, L2SeptState, L2Walked, MAX_VMS, Packed};
use crate::lock::Side;
use crate::sept::{Content, SeptEntry, SeptState, Walked};
use crate::status::{Code, Operand, Status};

/// RCX of the outputs: the page is pending.
const PENDING: u64 = 1 << 62;
/// Types of extended exit qualification.
const GPA_DETAILS: u64 = 2;
const ATTRIBUTE_WRITE: u64 = 5;
const WRITE_ACCESS: u64 = 2;

/// The entry's lock, held by the guest.
struct GuestLock<'p>(&'p SeptEntry);

impl Drop for GuestLock<'_> {
    fn drop(&mut self) {
        self.0.word().unlock();
    }
}

/// An entry of L1's tree, locked, with its content since then.
struct Locked<'p> {
    walked: Walked<'p>,
    content: Content,
    _lock: GuestLock<'p>,
}

/// Effect of writing one VM's attributes.
enum Change<'p> {
    None,
    Update(L2Walked<'p>, Attributes),
    Create(L2Walked<'p>, Attributes),
}

impl<'p> Guest<'p> {
    /// TDG.MEM.PAGE.ATTR.RD
    pub(in super::super) fn attributes_read(&mut self) -> Done {
        let done = self.attributes_of_page();
        self.without_outputs(done)
    }

    /// TDG.MEM.PAGE.ATTR.WR
    pub(in super::super) fn attributes_write(&mut self) -> Done {
        let done = self.write_attributes();
        self.without_outputs(done)
    }

    /// A leaf that fails returns 0 in RCX and RDX, unless RDX holds the attributes in force.
    fn without_outputs(&mut self, done: Result<Done, Status>) -> Done {
        let done = Done::from(done);
        if let Done::Status(status) | Done::HostPriority(status) = &done
            && status.is_error()
        {
            self.ctx.gprs.rcx = 0;
            if status.code() != Code::PAGE_ATTR_INVALID {
                self.ctx.gprs.rdx = 0;
            }
        }
        done
    }

    fn attributes_of_page(&mut self) -> Result<Done, Status> {
        let gpa = self.ctx.gprs.rcx;
        if !self.td.is_valid_private_gpa(gpa) {
            return Err(invalid(Operand::RCX));
        }
        let locked = match self.lock_entry(gpa, 0)? {
            Ok(locked) => locked,
            Err(done) => return Ok(done),
        };
        let (state, level) = (locked.content.state(), locked.walked.level);
        if !matches!(state, SeptState::Mapped | SeptState::Pending) {
            let exit = TdExit::new(Code::SUCCESS, REASON_EPT_VIOLATION);
            return Ok(leave(TdExit {
                r8: gpa & !0xFFF,
                ..exit
            }));
        }
        let size = 1u64 << (12 + 9 * u32::from(level));
        let pending = if state == SeptState::Pending {
            PENDING
        } else {
            0
        };
        let attributes = self.aliased(gpa, level).attributes();
        let r = &mut self.ctx.gprs;
        r.rcx = gpa & !(size - 1) | u64::from(level) | pending;
        r.rdx = attributes.0;
        Ok(Done::Status(Status::SUCCESS))
    }

    fn write_attributes(&mut self) -> Result<Done, Status> {
        let r = self.ctx.gprs;
        let (new, masks) = (Packed(r.rdx), Packed(r.r8));
        self.check_attributes(new, masks)?;
        let (gpa, level) = tree_gpa(self.td, r.rcx, 0..=2)?;
        let locked = match self.lock_entry(gpa, level)? {
            Ok(locked) => locked,
            Err(done) => return Ok(done),
        };
        let (content, found) = (locked.content, locked.walked.level);
        let state = content.state();
        if matches!(state, SeptState::NlMapped | SeptState::NlBlocked) && found == level {
            return Err(Code::PAGE_SIZE_MISMATCH.detail(u32::from(level)));
        }
        if found != level || !matches!(state, SeptState::Mapped | SeptState::Pending) {
            return Ok(self.entry_violation(gpa, level, found, content, ATTRIBUTE_WRITE));
        }
        let mut result = new;
        let changes = match self.changes(gpa, level, masks, &mut result)? {
            Ok(changes) => changes,
            Err(done) => return Ok(done),
        };
        for change in changes {
            match change {
                Change::None => {}
                Change::Update(entry, attributes) => Aliased::update(&entry, attributes),
                Change::Create(entry, attributes) => entry.set(L2Content::alias(
                    content.hpa(),
                    attributes,
                    state == SeptState::Pending,
                )),
            }
        }
        let pending = if state == SeptState::Pending {
            PENDING
        } else {
            0
        };
        self.ctx.gprs.rcx = r.rcx | pending;
        self.ctx.gprs.rdx = result.0;
        Ok(Done::Status(Status::SUCCESS))
    }

    /// Nothing for L1 and for VMs that the TD does not have; nothing without "valid".
    fn check_attributes(&self, new: Packed, masks: Packed) -> Result<(), Status> {
        for vm in 0..=MAX_VMS {
            let exists = (1..=self.td.num_l2_vms()).contains(&vm);
            let attributes = new.of(vm);
            let is_proper = exists && attributes.is_valid() || attributes.is_zero();
            if !is_proper {
                return Err(invalid(Operand::RDX));
            }
            if !exists && masks.part(vm) != 0 {
                return Err(invalid(Operand::R8));
            }
        }
        Ok(())
    }

    /// Computes the change for each VM; `result` becomes the attributes afterwards. The inner error is an exit to
    /// the host, which is to add a table.
    fn changes(
        &mut self,
        gpa: u64,
        level: u8,
        masks: Packed,
        result: &mut Packed,
    ) -> Result<Result<[Change<'p>; MAX_VMS], Done>, Status> {
        let mut changes = [Change::None, Change::None, Change::None];
        let mut illegal = false;
        let at = self.aliased(gpa, level);
        for vm in 1..=self.td.num_l2_vms() {
            // Bit 15 of a mask asks for INVEPT, which has nothing to act on here.
            let mask = masks.part(vm);
            let new = result.of(vm).masked(mask);
            if !new.is_valid() {
                continue;
            }
            let Some(entry) = at.find(vm) else {
                if !new.is_present() {
                    continue;
                }
                if !new.is_legal() {
                    illegal = true;
                    *result = result.with(vm, Attributes::ZERO);
                    continue;
                }
                *result = result.with(vm, new);
                match self.unaliased(&at, vm)? {
                    Ok(entry) => changes[vm - 1] = Change::Create(entry, new),
                    Err(done) => return Ok(Err(done)),
                }
                continue;
            };
            let current = entry.content.attributes();
            let merged = current.merged(new, mask);
            if merged.is_present() && !merged.is_legal() {
                illegal = true;
                *result = result.with(vm, current);
                continue;
            }
            let shown = if merged.is_present() {
                merged
            } else {
                Attributes::NONE
            };
            *result = result.with(vm, shown);
            changes[vm - 1] = Change::Update(entry, merged);
        }
        if illegal {
            self.ctx.gprs.rdx = result.0;
            return Err(Code::PAGE_ATTR_INVALID.status());
        }
        Ok(Ok(changes))
    }

    /// The free entry of a VM's tree that a new alias goes to.
    fn unaliased(
        &mut self,
        at: &Aliased<'p>,
        vm: usize,
    ) -> Result<Result<L2Walked<'p>, Done>, Status> {
        let failed = |level: u8| {
            let detail = (vm as u32) << 16 | u32::from(level);
            Err(Code::L2_SEPT_WALK_FAILED.detail(detail))
        };
        let Some(entry) = at.walk(vm) else {
            return failed(0);
        };
        if entry.level == at.level && entry.content.state() == L2SeptState::Free {
            return Ok(Ok(entry));
        }
        if !self.td.exits_on_l2_walk_failure(vm) {
            return failed(entry.level);
        }
        let details = u64::from(entry.level) << 3 | (vm as u64) << 20;
        let exit = TdExit::new(Code::SUCCESS, REASON_EPT_VIOLATION);
        Ok(Err(leave(TdExit {
            rcx: WRITE_ACCESS | entry.content.permissions() << 3,
            rdx: GPA_DETAILS | details << 32,
            r8: at.gpa & !0xFFF,
            ..exit
        })))
    }

    pub(in super::super) fn aliased(&self, gpa: u64, level: u8) -> Aliased<'p> {
        Aliased {
            p: self.p,
            td: self.td,
            gpa,
            level,
        }
    }

    /// Walks towards a level and locks the entry where the walk ends. The inner error is the way the leaf ends
    /// if the lock is taken.
    fn lock_entry(&self, gpa: u64, level: u8) -> Result<Result<Locked<'p>, Done>, Status> {
        loop {
            let walked = self
                .td
                .walk(&self.p.tables, gpa, level)
                .ok_or(invalid(Operand::RCX))?;
            let word = walked.entry.word();
            if !word.try_lock(Side::Guest) {
                let busy = Code::OPERAND_BUSY.on(Operand::RCX);
                return Ok(Err(match word.is_free_but_marked() {
                    true => Done::HostPriority(busy),
                    false => Done::Status(busy),
                }));
            }
            let lock = GuestLock(walked.entry);
            if walked.is_current() {
                let content = walked.entry.get();
                return Ok(Ok(Locked {
                    walked,
                    content,
                    _lock: lock,
                }));
            }
        }
    }

    /// The EPT violation of an instruction that works on entries of a certain kind only. Zero-step filtering
    /// does not count it.
    pub(in super::super) fn entry_violation(
        &self,
        gpa: u64,
        level: u8,
        found: u8,
        content: Content,
        kind: u64,
    ) -> Done {
        let state = content.state();
        let extended = kind
            | u64::from(level) << 32
            | u64::from(found) << 35
            | (state as u64) << 38
            | u64::from(state.is_leaf()) << 46;
        let exit = TdExit::new(Code::SUCCESS, REASON_EPT_VIOLATION);
        leave(TdExit {
            rcx: WRITE_ACCESS | (content.architectural() & 7) << 3,
            rdx: extended,
            r8: gpa,
            ..exit
        })
    }
}

fn leave(exit: TdExit) -> Done {
    Done::Other(Next::Leave(Box::new(exit)))
}

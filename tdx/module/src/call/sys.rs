//! Initialisation of the module on processors and packages, shutdown.

use super::{Call, Leaf, busy, invalid};
use crate::faults::KeyEngineFault;
use crate::lock::{Guard, LockMode, Side};
use crate::platform::{Platform, SysState};
use crate::status::{Code, Operand};
use std::sync::atomic::Ordering;

pub(super) fn global(p: &Platform, mode: LockMode) -> Leaf<Guard<'_>> {
    p.global
        .guard(mode, Side::Host)
        .ok_or(Code::SYS_BUSY.status())
}

/// PCONFIG, with its failures as statuses.
pub(super) fn pconfig(p: &Platform) -> Leaf {
    p.machine.pconfig().map_err(|e| match e {
        KeyEngineFault::Entropy => Code::KEY_GENERATION_FAILED.status(),
        KeyEngineFault::Busy => busy(Operand::KET),
    })
}

pub(super) fn all_lps_initialised(p: &Platform) -> bool {
    p.lps
        .iter()
        .all(|lp| lp.initialised.load(Ordering::Acquire))
}

/// TDH.SYS.INIT
pub(super) fn init(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let rcx = c.regs.rcx;
    (c.regs.rcx, c.regs.rdx) = (0, 0);
    (c.regs.r8, c.regs.r9, c.regs.r10) = (0, 0, 0);
    let _global = global(p, LockMode::Exclusive)?;
    if rcx != 0 {
        return Err(invalid(Operand::RCX));
    }
    if p.sys_state() != SysState::InitPending {
        return Err(Code::SYS_INIT_NOT_PENDING.status());
    }
    c.check_cpuid_limit()?;
    p.machine.rdrand().ok_or(Code::RND_NO_ENTROPY.status())?;
    p.boot_tsc_adjust.store(
        p.machine.tsc_adjust.load(Ordering::Acquire),
        Ordering::Release,
    );
    p.set_sys_state(SysState::InitDone);
    Ok(())
}

/// TDH.SYS.LP.INIT
pub(super) fn lp_init(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    (c.regs.rcx, c.regs.rdx, c.regs.r8) = (0, 0, 0);
    let _global = global(p, LockMode::Shared)?;
    if p.sys_state() != SysState::InitDone {
        return Err(Code::SYS_LP_INIT_NOT_PENDING.status());
    }
    if c.this.initialised.load(Ordering::Acquire) {
        return Err(Code::SYS_LP_INIT_DONE.status());
    }
    p.machine.rdrand().ok_or(Code::RND_NO_ENTROPY.status())?;
    c.check_cpuid_limit()?;
    c.check_tsc_adjust()?;
    c.this.initialised.store(true, Ordering::Release);
    Ok(())
}

/// TDH.SYS.KEY.CONFIG
pub(super) fn key_config(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let _global = global(p, LockMode::Exclusive)?;
    if p.sys_state() != SysState::ConfigDone {
        return Err(Code::SYS_KEY_CONFIG_NOT_PENDING.status());
    }
    let bit = 1 << c.this.package;
    if p.key_configured.load(Ordering::Acquire) & bit != 0 {
        return Err(Code::KEY_CONFIGURED.status());
    }
    pconfig(p)?;
    let done = p.key_configured.fetch_or(bit, Ordering::AcqRel) | bit;
    if done.count_ones() as usize == p.packages.len() {
        p.set_sys_state(SysState::Ready);
    }
    Ok(())
}

/// TDH.SYS.SHUTDOWN
pub(super) fn shutdown(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    if c.regs.rcx != 0 {
        return Err(invalid(Operand::RCX));
    }
    let _global = global(p, LockMode::Exclusive)?;
    if p.in_td.load(Ordering::Acquire) != 0 {
        return Err(Code::SYS_BUSY.status());
    }
    p.set_sys_state(SysState::Shutdown);
    Ok(())
}

/// TDH.SYS.UPDATE: there is nothing to hand over in this model.
pub(super) fn update(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let _global = global(p, LockMode::Exclusive)?;
    if p.sys_state() != SysState::InitDone || !all_lps_initialised(p) {
        return Err(Code::SYS_STATE_INCORRECT.status());
    }
    Ok(())
}

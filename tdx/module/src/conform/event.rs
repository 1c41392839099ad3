//! The recorded spellings of registers, events and locks.

use super::json::{Object, Parsed, narrow, number};
use crate::dump::LockTarget;
use crate::guest::VmExit;
use crate::lock::LockMode;
use crate::pamt::PageSize;
use crate::regs::{REGISTER_NAMES, Regs};
use crate::status::Status;
use crate::vcpu::{Event, EventType};
use serde_json::{Value, json};

/// Registers of an object; absent ones are 0.
pub(super) fn registers(v: Value) -> Parsed<Regs> {
    registers_over(v, Regs::default())
}

/// Registers of an object; absent ones are as in `base`.
pub(super) fn registers_over(v: Value, base: Regs) -> Parsed<Regs> {
    let mut regs = base.to_array();
    for (name, value) in Object::from_value(v)?.into_entries() {
        let i = REGISTER_NAMES
            .iter()
            .position(|n| *n == name)
            .ok_or_else(|| format!("unknown register {name}"))?;
        regs[i] = number(&value)?;
    }
    Ok(Regs::from_array(regs))
}

pub(super) fn show_event(event: Option<Event>) -> Option<Value> {
    let event = event?;
    let kind = match event.kind {
        EventType::Interrupt => "intr",
        EventType::Nmi => "nmi",
        EventType::HardwareException => "hwexc",
        EventType::SoftwareInterrupt => "swint",
        EventType::PrivilegedSoftwareException => "priv",
        EventType::SoftwareException => "swexc",
    };
    let mut v = json!({ "vector": event.vector, "type": kind });
    if let Some(error) = event.error {
        v["error"] = error.into();
    }
    if event.cr2 != 0 {
        v["cr2"] = event.cr2.into();
    }
    Some(v)
}

/// The recorded event in the form [`show_event`] gives.
pub(super) fn recorded_event(v: Option<Value>) -> Parsed<Option<Value>> {
    let Some(v) = v else { return Ok(None) };
    let mut o = Object::from_value(v)?;
    let mut out = json!({ "vector": o.number("vector")?, "type": o.string("type")? });
    for key in ["error", "cr2"] {
        if let Some(v) = o.take(key) {
            out[key] = number(&v)?.into();
        }
    }
    o.done()?;
    Ok(Some(out))
}

pub(super) fn vm_exit(o: &mut Object) -> Parsed<VmExit> {
    Ok(VmExit {
        reason: narrow(o.number("reason")?)?,
        qualification: o.number_or("qual", 0)?,
        gpa: o.number_or("gpa", 0)?,
        gla: o.number_or("gla", 0)?,
        info: o.number_or("info", 0)?,
        error: o.number_or("ierr", 0)?,
        ilen: narrow(o.number_or("ilen", 2)?)?,
        iinfo: narrow(o.number_or("iinfo", 0)?)?,
        idt_vectoring: o.number_or("idtv", 0)?,
        idt_error: o.number_or("idte", 0)?,
        cpl: narrow(o.number_or("cpl", 0)?)?,
    })
}

pub(super) fn page_size(level: u64) -> Parsed<PageSize> {
    narrow(level)
        .ok()
        .and_then(PageSize::from_level)
        .ok_or_else(|| format!("no level {level}"))
}

pub(super) fn lock_target(o: &mut Object) -> Parsed<(LockTarget, LockMode)> {
    let name = o.string("lock")?;
    let tdr = |o: &mut Object| o.number("tdr");
    let target = match name.as_str() {
        "global" => LockTarget::Global,
        "kot" => LockTarget::Kot,
        "wbt" => LockTarget::Wbt {
            package: narrow(o.number("package")?)?,
        },
        "tdmr" => LockTarget::Tdmr {
            index: narrow(o.number("index")?)?,
        },
        "pamt" => LockTarget::Pamt {
            pa: o.number("pa")?,
            size: page_size(o.number("level")?)?,
        },
        "op_state" => LockTarget::OpState { tdr: tdr(o)? },
        "sept_tree" => LockTarget::SeptTree { tdr: tdr(o)? },
        "td_epoch" => LockTarget::TdEpoch { tdr: tdr(o)? },
        "rtmr" => LockTarget::Rtmr { tdr: tdr(o)? },
        "mig" => LockTarget::Mig { tdr: tdr(o)? },
        "servtd" => LockTarget::Servtd { tdr: tdr(o)? },
        "sept_entry" => LockTarget::SeptEntry {
            tdr: tdr(o)?,
            gpa: o.number("gpa")?,
            level: narrow(o.number("level")?)?,
        },
        other => return Err(format!("unknown lock {other}")),
    };
    let mode = match o.string("mode")?.as_str() {
        "sh" => LockMode::Shared,
        "ex" => LockMode::Exclusive,
        other => return Err(format!("unknown mode {other}")),
    };
    Ok((target, mode))
}

/// A TD exit's status as transcripts spell it: with the exit reason as operand.
pub(super) fn exit_status(status: Status) -> String {
    format!("{}|EXIT:{}", status.code().status(), status.detail())
}

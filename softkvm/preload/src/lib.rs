#![doc = include_str!("../README.md")]

mod area;
mod behind;
mod caller;
mod calls;
mod clock;
mod cpuid;
mod event;
mod files;
mod lent;
mod limits;
mod locks;
mod log;
mod memory;
mod own;
mod places;
mod raw;
mod record;
mod signals;
mod stat;

#![doc = include_str!("../README.md")]

mod area;
mod caller;
mod calls;
mod cpuid;
mod event;
mod files;
mod lent;
mod limits;
mod log;
mod memory;
mod own;
mod raw;
mod record;
mod signals;
mod stat;

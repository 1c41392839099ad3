//! Failures and steps are events that name the technology, the VM, the vCPU, the command or RMP
//! instruction and its status; a run of a vCPU is a span.

mod common;

use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use kvm_ops_core::guest::Script;
use kvm_ops_core::{
    Backend, Error, Fault, FaultPlan, Gpa, Host, InitialPage, InitialPageKind, InjectedHost, Tech,
    VcpuId, VcpuOps, Vendor, VmId, VmOps, VmParams,
};
use kvm_ops_sev::SevVm;
use kvm_ops_sim::SimHost;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

//! What a partitioned TD's L1 asks of the module, and what its L2 VMs meet.

mod attributes;

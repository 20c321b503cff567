// Package natlog is the log of translated connections: which pod had which port of an egress IP from when to when,
// toward whom. A line is a JSON object (docs/natlog.md); Writer writes lines without ever making its caller wait, and
// Search finds who had a port in what was written.
//
// It owns the files that a Writer is given, and nothing in the kernel or in etcd. It reads no conntrack events: the
// agent does, and calls Write.
//
// Invariants:
//   - Write never blocks, and the queue is bounded: lines that do not fit are dropped.
//   - What is dropped is counted, by reason, and the log itself says how many and since when, as soon as it can be
//     written to.
//   - After a write that ended within a line, the next one begins a new line, so that a reader can skip the broken one.
//   - Search does not conclude from missing lines: it says which part of the time in question the log covers, and what
//     was lost around it.
package natlog

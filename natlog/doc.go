// Package natlog is the log of translated connections: which pod had which port of an egress IP from when to when, toward whom. A line is a JSON object
// (docs/natlog.md); Writer writes lines without ever making its caller wait, and Search finds who had a port in what was written.
//
// It owns the files that a Writer is given, and nothing in the kernel or in etcd. It knows nothing of where connections come from: the agent does.
//
// Invariants:
//   - Write never blocks, and takes no memory without bound: what there is no room for is dropped.
//   - What is dropped is counted, by reason, and the log itself says how many and since when, as soon as it can be written to.
//   - A line is whole, or it is none: after a write that was cut off, the next one begins a line of its own.
//   - Search takes no absence for an answer: it says what of the time in question the log covers, and what was lost around it.
package natlog

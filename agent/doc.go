// Package agent is the agent of one node. Whenever something changes (etcd, the kernel, a timer, the lease) it
// reconciles: it takes a snapshot of etcd, plans what the node's kernel is to hold, applies the difference between the
// plan and the kernel, and then does in etcd what the kernel is ready for: claims, releases and the two halves of a
// planned move.
//
// Where to read what: agent.go puts the parts together, and reconcile.go has the loop and the order of its steps.
//   - Who owns an IP: machine.go drives package ownership, locks.go makes its transactions in etcd, lease.go keeps the
//     lease and asks for etcd's yes, peers.go is what agents say to each other, moves.go the planned moves that the node
//     asks for, and restart.go how locks outlive the process.
//   - The kernel: facts.go and reading.go read it, kernel.go and fastpath.go program it, permits.go renews its leave to
//     use an egress IP, and flush.go deletes entries of conntrack.
//   - What no event tells: probes.go asks whether another host uses an IP, drops.go what the guard drops, and ports.go
//     how many ports are in use.
//   - What is published: record.go writes agents/<node>, metrics.go and scrape.go tell Prometheus what counts.go and
//     takeover.go have counted, natlog.go logs connections, and who.go, trace.go, path.go, live.go and traffic.go answer
//     questions.
//
// It owns order, back-off and shutdown. It owns nothing in the kernel itself (the kernel packages do) and, in etcd, the
// key agents/<node>, the locks owners/<ip> that it claimed, and the readiness of moves toward its node.
//
// Invariants:
//   - A permit is renewed only while etcd is known to keep the agent's lease, counted from when the confirmed request
//     was sent (ownership).
//   - A lock that was claimed is used only when the permit of a former owner has certainly ended (ownership).
//   - Nothing is applied before etcd was read whole, and nothing is deleted because of an error.
//   - A steady state writes nothing but the lease, and renews permits without a commit. Termination leaves kernel and
//     lease to a successor.
//
// Which IPs the node answers for, and what becomes of their locks, package ownership decides, which remembers only
// time: since when a lock is seen, and until when a former owner relays. All else is read again where the kernel or
// etcd tell of a change, or may have missed to (reading.go).
package agent

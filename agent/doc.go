// Package agent is the agent of one node. Whenever something changes (etcd, the kernel, a timer, the lease) it
// reconciles: it takes a snapshot of etcd, plans what the node's kernel is to hold, applies the difference between the
// plan and the kernel, and then does in etcd what the kernel is ready for: claims, releases and the two halves of a
// planned move.
//
// Where to read what: reconcile.go has the loop and the order of its steps, kernel.go what is programmed, locks.go the
// transactions in etcd, lease.go and restart.go how locks outlive the process, permits.go the kernel's leave to use an
// egress IP, record.go what the agent publishes of itself, moves.go the planned moves that it asks for, and peers.go
// what it says to other agents.
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

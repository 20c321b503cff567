// Package gossip says which agents are alive, within a second: membership by hashicorp/memberlist among the agents,
// over TCP and UDP. It knows neither the kernel nor etcd, and owns nothing there. Its user gives it the peers (Set) and
// may send messages to members (Send).
//
// Invariants:
//   - All traffic is encrypted with the key; who has not the key can neither join nor report anybody dead.
//   - A member that stops in order is Left, never Dead.
//   - Dead is what this node believes: where the network is partitioned, the member may run and believe the same of
//     this node. A caller that acts on it must be safe in both cases.
package gossip

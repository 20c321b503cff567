// Package gossip says which agents are alive, within a second: membership by hashicorp/memberlist among the agents,
// over TCP and UDP. It knows neither the kernel nor etcd, and owns nothing there. Its user gives it the peers (Set) and
// may send messages to members (Send).
//
// Invariants:
//   - All traffic is encrypted with a key; who has none of the keys can neither join nor report anybody dead. Keys are
//     replaced while it runs: first all members get the next one as a second one, then as the first one, then alone.
//   - A member that stops in order is Left, never Dead.
//   - Dead is what this node believes: where the network is partitioned, the member may run and believe the same of
//     this node. A caller that acts on it must be safe in both cases.
package gossip

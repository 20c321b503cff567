// Package gossip tells which agents are alive, within a second: membership by hashicorp/memberlist among the agents, over TCP and UDP.
// It knows neither the kernel nor etcd, and owns nothing there. Peers are told to it (Set), and messages carried for its user (Send).
//
// Invariants:
//   - All traffic is encrypted with the key; who has not the key can neither join nor report anybody dead.
//   - A member that was told to leave is Left, never Dead.
//   - A report is an opinion: a member that is Dead here may run and believe the same of us. Whoever acts on it must be safe either way.
package gossip

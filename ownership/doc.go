// Package ownership decides for the agent of one node which egress IPs its kernel answers for and sends with, and what
// it does about their locks in etcd. Machine is pure: it has no I/O, no goroutine, no clock and no log. Events go in,
// effects come out, and time is an argument.
//
// The package agent drives it: it brings the events, and does the effects in kernel and etcd. Planned moves that a node
// asks for by itself (drain, rebalance), questions about other holders of an IP, and what the kernel holds beside its
// permits are the agent's own. It may leave a Ready, a HandOver, a Revoke or a Claim undone, as when the kernel is not
// ready for it: the next round asks again.
//
// # The promise
//
// No two kernels answer for one egress IP at any moment. All that follows is with gossip; without, the last section.
//
// # Why it holds
//
// P is Config.Permit. A node may answer for an IP from when Machine.roles says plan.Own, until its kernel's permit
// ends. So there are two sides, which meet at the lock: when a permit of a former owner has certainly ended, and when a
// new one begins.
//
// A permit ends P after a moment at which nobody had revoked the lease of its lock, whatever agent, network and etcd do
// from then on:
//
//  1. etcd's yes counts from when the question was sent, not from when the answer came (Machine.confirmed).
//  2. Only a linearizable read counts; a leader of etcd that was cut off still grants renewals (Lease.renewed leaves
//     Confirmed alone).
//  3. What is known of one lease says nothing about locks under another (Machine.limit).
//  4. The kernel gets a tenth of P less than the bound, for the write and for clocks of different speed (Machine.Look).
//     A write that took longer than half of that is cut by whoever wrote it.
//  5. A permit that was narrowed is never lengthened, and what the kernel did not acknowledge is asked for again
//     (Machine.Narrow).
//
// A new owner begins when no permit of a former one can be left:
//
//  6. It waits the longest P (below) from when it saw its own lock, which came after the end of the former lease
//     (Machine.roles), or from when it saw a suspicion against the former owner, if etcd says in the lock that it stood
//     until that end (egress.Owner.Suspicion, Machine.suspicion): while one stands the owner gets no yes, since it has to end
//     it first (store.Lease.Confirm). The two spans of P are on two clocks, and the later one does not begin before the
//     earlier one.
//  7. It need not wait when the former owner fell silent before the lock changed: it handed the IP over
//     (Machine.settle: only with the role plan.Relay, after the kernel acknowledged the silence), or gave it back after
//     the last lock that the new one saw (Claim.Seen). An owner that gives back what it has not used yet has not waited
//     itself, so whoever is next has to (Release.Unused, store.Lease.MoveTo). What is given back, or may have been
//     handed over, is not used again, whatever the next snapshot wants: it may be older than that (Machine.release,
//     Machine.roles).
//  8. It need not wait for an IP that its own kernel answers for all along, and does not only relay (Adopted). What a
//     former process of the node sent may still be on its way to etcd: so the next one gives its record and all its
//     locks new revisions before it resumes their permits, and a late Release, HandOver or MoveTo, which is of the old
//     ones, does nothing (store.Lease.Renumber).
//  9. Peers suspect and revoke only the lease of an agent that says in its record that its permits are bounded, and it
//     says so when its kernel has acknowledged that it has no others (Machine.revocable). A suspicion is of one lease,
//     and of a record that is as it was read; an agent that adopts the lease, or moves to one that lasts longer, ends
//     it first (store.Client.Suspect, store.Lease.MoveTo). What stood in an etcd that was restored, or while an agent
//     that knows no suspicions was under the lease, counts for nothing (peers.suspect).
//
// P may differ between nodes, and change when an agent is started anew. Etcd has the longest one:
//
//  10. A permit is as long as P only by a yes that was asked for after etcd said so to all who claim later: in the
//     agent's record and, with the same or a longer one, in the record permit (Machine.declared). A successor with a
//     longer P goes on with the former one's until then (Adopted).
//  11. Who claims goes by the record permit in the snapshot that shows its lock, which is not older than the lock
//     (Machine.roles). It is lowered ten times as long after the last agent with a longer P was seen, if none has come
//     in that very moment (Machine.shorten).
//
// An etcd that is restored to an older revision is another one. Answers show that (egress.Snapshot.Restores):
//
//  12. Such an answer is no yes, and no lock is changed, until there is a view of the same etcd (Machine.confirmed,
//     Machine.restored, Machine.outdated).
//  13. All locks of the first such view that has all are new to their node, and those of views before that have some
//     (premise 21), whether it has used them or not, and nobody is known to have given anything up before that
//     (Machine.roles). So permits of the former etcd are over when the first lock is used.
//
// While all agents have lost etcd, permits go on by promises:
//
//  14. A promise binds for the longer P of the two from when it is given: no claim, no revocation (Machine.act), no use
//     of what was claimed and not used yet (Machine.roles). It counts from when it was asked for, so it ends for who
//     asked before it ends for who promised (promises.heard). None is given to whose lease is seen to be over
//     (promises.ended): what was under it may be in use, while a machine that was paused together with its clock has
//     its permits still.
//  15. All that could claim have to promise (promises.all): the agents of etcd's last snapshot, and those that joined
//     since and that the gossip knows; the gossip has joinGrace to hear of an agent, and permits without its promise
//     the longest P to end, before that uses what it claims (Machine.roles). It joins when its record is in etcd, and
//     again when it gets another lease: whoever lost etcd in between does not have its record. An agent without gossip
//     promises nothing, and nobody hears that it joins: who was last seen without has to promise also when its record
//     is gone (promises.meet). Before the first snapshot nobody knows who has to promise, and after the answer of
//     another etcd there is one, so no promise counts.
//  16. A promise carries on what etcd's yes began, and begins nothing (Machine.limit, by permitEnd.limit).
//  17. A process that begins does not know what its former one promised, so it is bound for the longest P
//     (promises.see).
//  18. Answers to a former process count for nothing (promises.heard, Message.Process).
//  19. An agent that has no use for a yes asks etcd for none, and does not know whether it has etcd (Machine.Asks). It
//     promises until etcd has answered it, since a promise only binds, and asks etcd until nobody asks it any more
//     (promises.heard).
//  20. How often a lease is renewed is no premise of any of this: a permit goes by what etcd granted, from when that
//     was asked for (Lease.renewed). So an agent with nothing under its lease but its record renews it a third as often
//     (Machine.Idle, store.Lease.Run).
//
// A node that no pool selects need not see the locks of all IPs:
//
//  21. By a view that lacks some (egress.Snapshot.Partial) nothing is claimed, revoked or prepared for a move
//     (Machine.act, round.find), and what was known of owners and of the dead before is forgotten
//     (Machine.forget). What it shows of a lock of this node holds as in any view.
//  22. A node sees fewer than all when it holds nothing in a view of all locks of the same etcd, and cannot have sent
//     anything any more that would bring it one (Machine.look, plan.Cluster.Bystander). So no lock of this node is out
//     of its sight; the driver asks etcd now and then whether one is all the same, as where a request took longer than
//     Config.Late. The nodes that revoke are ranked among those that pools select.
//
// A restart: the locks move to a lease that nobody revokes, and as soon as the record has, whose move ends etcd's
// yes, the permits are lengthened to that lease's end (Extended), where the kernel has some and the lock has moved.
// Where they had ended before, or something fails, the kernel is made silent and the lease is ended: nobody could
// take the locks from it. Locks that the kernel answers for, or has not acknowledged silence about, move along;
// others are given back (Machine.Keeps), after their permits have been ended: an answer of etcd that comes late would
// renew them.
//
// Without gossip nobody revokes: permits end when the lease does, at the earliest, and claimers wait P from then. The
// premise is that etcd keeps a lease for its TTL after each renewal that it granted.
//
// # What is assumed
//
// Clocks of nodes differ in speed by half a percent at most. A process is not frozen between its look at the clock and
// a commit of permits for longer than the margin (the agent cuts such a commit as soon as it runs again). A machine is
// not paused together with its clock. Etcd is linearizable. An etcd that is restored has an older revision or term of
// raft than each agent knows when it first asks it, or a much newer revision (egret-etcd sees to that), and was backed
// up after the last restart of an agent, whose permits it does not know; without gossip it says nothing of permits at
// all. An agent of a version that knows no suspicions writes its record before a lease that it adopted under one is
// revoked. All agents know of the record permit before one is started with another P. Who joins while others have lost
// etcd can be reached by them within joinGrace; one without gossip was seen so by all others, as they run, while they
// had etcd, and its Node stays. The tests say more in docs/ownership.md.
package ownership

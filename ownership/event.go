package ownership

import (
	"net/netip"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
)

// Event is what happened. Those that begin a stage of a round come in the order View, Facts, Programmed, Settled.
type Event interface{ event() }

type (
	// Granted: etcd gave a lease, or renewed one that was adopted, at the request sent at Sent. The machine's locks are
	// under it from now on.
	Granted struct {
		Lease int64
		Sent  time.Time
		TTL   time.Duration
	}
	// Renewed: etcd renewed the lease at the request sent at Sent.
	Renewed struct {
		Lease int64
		Sent  time.Time
		TTL   time.Duration
	}
	// Lost: etcd does not know the lease.
	Lost struct{ Lease int64 }
	// Confirmed: agents/<node> was there under the lease, in a linearizable read that was sent at Sent, when this
	// process had seen that many Restores of etcd. An answer which shows another one is none.
	Confirmed struct {
		Lease    int64
		Sent     time.Time
		Restores int
	}
	// View: etcd as it was at one revision. It begins a round.
	View struct{ Cluster *plan.Cluster }
	// Facts: what the node knows of itself, who is dead by the gossip, and the IPs of which the node asks whether
	// another host has them.
	Facts struct {
		Facts  plan.Facts
		Dead   func(node string) bool
		Asking []netip.Addr
	}
	// Programmed: the kernel holds what the roles ask for. Not Applied: its tables do not.
	Programmed struct{ Applied bool }
	// Settled: the effects of Programmed were tried.
	Settled struct{}
	// Unable: the node cannot serve any IP, and its kernel is silent about all of them. It takes the place of Facts and
	// what comes after that.
	Unable struct{}
	// HandedOver: etcd's answer to a HandOver, or none (Err).
	HandedOver struct {
		IP  netip.Addr
		OK  bool
		Err bool
	}
	// Heard: a peer's word.
	Heard struct {
		From    string
		Message Message
	}
	// Question: it is time to ask the peers for promises, every tenth of P. Peers are all other agents that could
	// claim: those of etcd's last snapshot, and those that the gossip knows to be alive. There is none before the first
	// snapshot, nor need there be one while etcd answers, or while the machine does not ask it.
	Question struct{ Peers []string }
	// Adopted: this process goes on with the permits that the kernel had for locks under its lease.
	Adopted struct {
		IPs []netip.Addr
		// As the former agent's record said; an older one says no Permit.
		Revocable bool
		Permit    time.Duration
	}
	// Extended: the locks of the IPs are under a lease that outlives the process, and which nobody revokes: the permits
	// that the kernel has for them may last as long.
	Extended struct {
		Lease int64
		Sent  time.Time
		TTL   time.Duration
		IPs   []netip.Addr
	}
)

func (Granted) event()    {}
func (Renewed) event()    {}
func (Lost) event()       {}
func (Confirmed) event()  {}
func (View) event()       {}
func (Facts) event()      {}
func (Programmed) event() {}
func (Settled) event()    {}
func (Unable) event()     {}
func (HandedOver) event() {}
func (Heard) event()      {}
func (Question) event()   {}
func (Adopted) event()    {}
func (Extended) event()   {}

// Effect is what is to be done, in the order of the list.
type Effect interface{ effect() }

type (
	// Withdraw ends every permit at once.
	Withdraw struct{}
	// Restrict ends at once what May does not allow of a permit.
	Restrict struct{}
	// Renew renews the permits now.
	Renew struct{}
	// Program makes the kernel hold what the roles ask for, its permits included.
	Program struct{ Roles map[netip.Addr]plan.Role }
	// Watch says whether the view has to have the owners of All egress IPs, or only of those that the node's pods use.
	Watch struct{ All bool }
	// Publish says in agents/<node> what P is, and whether peers may revoke the lease.
	Publish struct{ Revocable bool }
	// Suspect writes a suspicion against an agent, if there is none, and its record is as it was at revision Seen.
	Suspect struct {
		Suspicion egress.Suspicion
		Seen      int64
	}
	// Longest makes P of all agents what etcd says of the longest one: Raise where this node's is longer, else after
	// all agents with a longer one are gone, and only if none has come since the snapshot.
	Longest struct {
		Permit time.Duration
		Raise  bool
	}
	// Release gives a lock back, if it is of that revision still. Unused: this node has not waited yet until the owner
	// before it was certainly silent, so whoever is next has to.
	Release struct {
		Owner  egress.Owner
		Unused bool
	}
	// Ready says that this node, the target of the move, is ready.
	Ready struct{ Move egress.Move }
	// HandOver gives a lock to the target of a move, if all three are of their revisions.
	HandOver struct{ plan.Departure }
	// Revoke ends the lease of an agent, if the suspicion against it still stands, where there is one. Former: it is
	// one of this node's own former life.
	Revoke struct {
		Node      string
		Lease     int64
		Former    bool
		Suspicion egress.Suspicion
	}
	// Claim takes a lock that nobody has. Seen is the revision of the last lock of the IP that this node saw, or 0, and
	// Suspicion the one that stands against its owner, if any.
	Claim struct {
		plan.Claim
		Seen      int64
		Suspicion egress.Suspicion
	}
	// Confirm asks etcd for a yes now, and from then on for as long as the machine Asks.
	Confirm struct{}
	// Say sends a message to a peer, which may get lost.
	Say struct {
		To      string
		Message Message
	}
	// Wake begins a round: something changed that the view does not show.
	Wake struct{}
	// Used says that this node uses a lock from now on.
	Used struct{ Owner egress.Owner }
	// Returned says that an IP that this node still relayed for its next owner comes back: what is left of its last
	// time here has to go.
	Returned struct{ IP netip.Addr }
)

func (Withdraw) effect() {}
func (Restrict) effect() {}
func (Renew) effect()    {}
func (Program) effect()  {}
func (Watch) effect()    {}
func (Publish) effect()  {}
func (Longest) effect()  {}
func (Suspect) effect()  {}
func (Release) effect()  {}
func (Ready) effect()    {}
func (HandOver) effect() {}
func (Revoke) effect()   {}
func (Claim) effect()    {}
func (Confirm) effect()  {}
func (Say) effect()      {}
func (Wake) effect()     {}
func (Used) effect()     {}
func (Returned) effect() {}

package ownership

import (
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
)

// wire is machines that hear each other at once, with a clock for all.
type wire struct {
	now    time.Time
	cut    map[string]bool // off from its peers
	all    map[string]*Machine
	woken  map[string]int
	silent bool // who asks has no permits
}

const oneMinute = time.Minute // how long the permits of a wire are

func newWire(names ...string) *wire {
	w := &wire{now: epoch, cut: map[string]bool{}, all: map[string]*Machine{}, woken: map[string]int{}}
	for i, name := range names {
		m := New(Config{Node: name, Permit: oneMinute, Gossip: true, Freeze: true, Process: uint64(i + 1), Start: w.now})
		m.Step(w.now, Granted{Lease: int64(i + 1), Sent: w.now, TTL: time.Hour})
		m.permits.needed = true
		m.Step(w.now, Confirmed{Lease: int64(i + 1), Sent: w.now})
		w.all[name] = m
	}
	return w
}

// see shows everybody etcd, with an agent for each.
func (w *wire) see() {
	s := &egress.Snapshot{Agents: map[string]egress.Agent{}}
	for name := range w.all {
		s.Agents[name] = egress.Agent{Node: name}
	}
	for name, m := range w.all {
		m.Step(w.now, View{Cluster: plan.New(s)})
		m.Step(w.now, Question{Peers: slices.DeleteFunc(slices.Sorted(maps.Keys(w.all)), func(peer string) bool { return peer == name })})
	}
}

// etcd says that these have it now.
func (w *wire) etcd(names ...string) {
	for _, name := range names {
		m := w.all[name]
		m.Step(w.now, Confirmed{Lease: m.Lease().ID, Sent: w.now})
	}
}

// ask lets an agent ask all others, and returns whether all promised.
func (w *wire) ask(who string) bool {
	m := w.all[who]
	for _, peer := range m.promises.peers {
		w.deliver(who, Say{To: peer, Message: Message{Process: m.cfg.Process, Sent: w.now.Sub(m.cfg.Start), Silent: w.silent}})
	}
	return !m.promises.all(w.now).Before(w.now)
}

func (w *wire) deliver(from string, s Say) {
	if w.cut[from] || w.cut[s.To] {
		return
	}
	for _, effect := range w.all[s.To].Step(w.now, Heard{From: from, Message: s.Message}) {
		switch f := effect.(type) {
		case Say:
			w.deliver(s.To, f)
		case Wake:
			w.woken[s.To]++
		}
	}
}

func TestIPsAreKeptOnlyWhileAllHaveLostEtcd(t *testing.T) {
	for _, tt := range []struct {
		name string
		have []string // etcd
		cut  string   // off from its peers
		want bool
	}{
		{"nobody has etcd", nil, "", true},
		{"one peer has it", []string{"c"}, "", false},
		{"one peer does not answer", nil, "c", false},
		{"both peers have it", []string{"b", "c"}, "", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWire("a", "b", "c")
			w.see()
			w.now = w.now.Add(time.Hour)
			w.etcd(tt.have...)
			w.cut[tt.cut] = true
			if got := w.ask("a"); got != tt.want {
				t.Errorf("a keeps its IPs: %t, want %t", got, tt.want)
			}
		})
	}
}

// An agent that adopted permits, and lost etcd before it had seen it, kept them for as long as that took.
func TestWhoDoesNotKnowTheOthersHasNoPromiseOfAll(t *testing.T) {
	w := newWire("a")
	m := w.all["a"]
	m.Step(w.now, Confirmed{Lease: m.Lease().ID, Sent: w.now})
	m.Step(w.now, Adopted{Revocable: true})
	m.Grant([]Permit{{Answer: true}}, true)
	m.Written(w.now.Add(oneMinute), w.now.Add(oneMinute))
	w.now = w.now.Add(oneMinute / 2)
	before, _, err := m.Look(w.now)
	if w.see(); err != nil {
		t.Fatal(err)
	}
	if after, _, err := m.Look(w.now); err != nil || !before.Before(after) {
		t.Errorf("alone, without etcd: permits until %v before the first snapshot, %v after it, %v: want later, since nobody else is there", before, after, err)
	}
}

// An agent without gossip that adopted bounded permits asks nobody, so nobody has promised it anything, also where it
// knows of no other agent.
func TestWithoutGossipThereAreNoPromises(t *testing.T) {
	now := epoch
	m := New(Config{Node: "a", Permit: oneMinute, Freeze: true, Start: now})
	m.Step(now, Granted{Lease: 1, Sent: now, TTL: time.Hour})
	m.Step(now, Confirmed{Lease: 1, Sent: now})
	m.Step(now, Adopted{Revocable: true})
	m.Step(now, View{Cluster: plan.New(&egress.Snapshot{Agents: map[string]egress.Agent{"a": {Node: "a"}}})})
	m.Grant([]Permit{{Answer: true}}, true)
	end, limit, err := m.Look(now)
	if err != nil {
		t.Fatal(err)
	}
	m.Written(end, limit)
	if later, _, err := m.Look(now.Add(oneMinute / 2)); err != nil || later.After(end) {
		t.Errorf("without etcd's yes the permits go on until %v, %v; want %v", later, err, end)
	}
}

func TestPromiseBindsAndOutlastsTheReturnOfEtcd(t *testing.T) {
	w := newWire("a", "b")
	w.see()
	w.now = w.now.Add(time.Hour)
	if !w.ask("a") {
		t.Fatal("b has lost etcd and does not promise")
	}
	if b := w.all["b"]; !b.Promised(w.now.Add(oneMinute-1)) || b.Promised(w.now.Add(oneMinute)) {
		t.Error("b is not bound for a permit's length")
	}
	if w.etcd("b"); !w.ask("a") {
		t.Error("b has got etcd back just now, a has not, and b promises no more")
	}
	w.now = w.now.Add(returning)
	if w.etcd("b"); w.ask("a") {
		t.Error("b has had etcd for long and still promises")
	}
}

// It is cut off from an etcd that others have. While nobody has it, or for a moment, it is not.
func TestNobodyBindsOthersForLongerThanAPermitMayBe(t *testing.T) {
	for permit, want := range map[time.Duration]bool{MaxPermit: true, MaxPermit + 1: false, 1<<63 - 1: false} {
		w := newWire("a", "b")
		w.see()
		w.now = w.now.Add(time.Hour) // nobody has etcd
		m := w.all["b"]
		promised := len(m.Step(w.now, Heard{From: "a", Message: Message{Process: 1, Permit: permit}})) > 0
		if until := m.promises.until; promised != want || want != until.Equal(w.now.Add(permit)) || until.After(w.now.Add(MaxPermit)) {
			t.Errorf("asked for %v: promised %t, until %v later; want %t", permit, promised, until.Sub(w.now), want)
		}
	}
}

func TestWhoAsksInVainIsPartitioned(t *testing.T) {
	w := newWire("a", "b")
	w.see()
	w.silent = true
	ask := func(d time.Duration, etcd ...string) {
		for end := w.now.Add(d); w.now.Before(end); w.now = w.now.Add(oneMinute / 10) {
			w.etcd(etcd...)
			w.ask("a")
		}
	}
	for _, step := range []struct {
		name string
		do   func()
		want bool
	}{
		{"a asks for a moment", func() { ask(oneMinute, "b") }, false},
		{"a goes on asking", func() { ask(oneMinute, "b") }, true},
		{"a asks no more", func() { w.now = w.now.Add(oneMinute) }, false},
		{"a asks anew", func() { ask(oneMinute, "b") }, false},
		{"a has permits: its etcd is slow", func() { w.silent = false; ask(5*oneMinute, "b"); w.silent = true }, false},
		{"nobody has etcd", func() { ask(5 * oneMinute) }, false},
		{"b has it again", func() { ask(returning+oneMinute/2, "b") }, false},
		{"and a has not", func() { ask(oneMinute, "b") }, true},
	} {
		if step.do(); w.all["b"].Partitioned(w.now, "a") != step.want {
			t.Errorf("%s: partitioned is %t", step.name, !step.want)
		}
	}
	if w.woken["b"] != 2 {
		t.Errorf("b was woken %d times, want 2", w.woken["b"])
	}
}

func TestAnswersToAFormerProcessCountForNothing(t *testing.T) {
	w := newWire("a", "b")
	w.see()
	w.now = w.now.Add(time.Hour)
	a := w.all["a"]
	w.deliver("a", Say{To: "b", Message: Message{Process: a.cfg.Process + 10, Sent: w.now.Sub(a.cfg.Start)}})
	if !a.promises.all(w.now).IsZero() {
		t.Error("the answer to another process was taken for a promise")
	}
}

// The leases of all but one agent have ended while they had lost etcd. That one then loses it, and they come back: who
// has no gossip can claim, is heard of by nobody, and promises nothing.
func TestWhoWasSeenWithoutGossipHasToPromise(t *testing.T) {
	for _, tt := range []struct {
		name string
		last egress.Agent // record of c
		gone bool         // its node
		want bool
	}{
		{"with gossip", egress.Agent{Promises: true}, false, true},
		{"with gossip, of an older version", egress.Agent{Revocable: true}, false, true},
		{"without gossip", egress.Agent{}, false, false},
		{"without gossip, and its node is gone", egress.Agent{}, true, true},
		{"of an older version, and restarts", egress.Agent{Restarting: true}, false, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWire("a", "b")
			a, nodes := w.all["a"], map[string]egress.Node{"a": {Name: "a"}, "b": {Name: "b"}, "c": {Name: "c"}}
			see := func(agents map[string]egress.Agent) {
				a.Step(w.now, View{Cluster: plan.New(&egress.Snapshot{Agents: agents, Nodes: nodes})})
			}
			see(map[string]egress.Agent{"c": tt.last})
			if tt.gone {
				nodes = map[string]egress.Node{"a": {Name: "a"}, "b": {Name: "b"}}
			}
			see(map[string]egress.Agent{"a": {}})
			w.now = w.now.Add(time.Hour)
			a.Step(w.now, Question{Peers: []string{"b"}}) // as the gossip knows
			w.all["b"].Step(w.now, Question{})
			w.deliver("a", Say{To: "b", Message: Message{Process: a.cfg.Process, Sent: w.now.Sub(a.cfg.Start)}})
			if got := !a.promises.all(w.now).Before(w.now); got != tt.want {
				t.Errorf("a has the promise of all: %t, want %t", got, tt.want)
			}
		})
	}
}

// The machine of a node was paused together with its clock, while its lease was revoked and its IPs were claimed. It goes
// on with permits that should have ended, and all have lost etcd.
func TestWhoseLeaseIsOverGetsNoPromise(t *testing.T) {
	lease := egress.FormatLease(1)
	for _, tt := range []struct {
		name     string
		revision int64  // of what b has seen last; 0: nothing yet
		record   string // the lease of a's in that
		seen     int64  // by a
		want     bool
	}{
		{"its lease is there", 20, lease, 20, true},
		{"b has not seen etcd yet", 0, "", 20, true},
		{"b saw etcd before a's record came", 19, "", 20, true},
		{"b saw etcd with a's former record", 19, "7", 20, true},
		{"its lease is over", 21, "", 20, false},
		{"it is over, and a has seen so little that it may not know its record", 21, "", 0, true},
		{"another one is there", 21, "7", 20, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWire("a", "b")
			a, b := w.all["a"], w.all["b"]
			see := func(m *Machine, revision int64, lease string) {
				s := &egress.Snapshot{Revision: revision, Agents: map[string]egress.Agent{}}
				if lease != "" {
					s.Agents["a"] = egress.Agent{Node: "a", Lease: lease}
				}
				m.Step(w.now, View{Cluster: plan.New(s)})
			}
			if tt.seen > 0 {
				see(a, tt.seen, lease)
			}
			see(a, tt.seen+5, "") // by which it loses its lease, some time
			if tt.revision > 0 {
				see(b, tt.revision, tt.record)
			}
			w.now = w.now.Add(time.Hour)
			for _, e := range a.Step(w.now, Question{Peers: []string{"b"}}) {
				w.deliver("a", e.(Say))
			}
			if got := !a.promises.all(w.now).Before(w.now); got != tt.want {
				t.Errorf("b promises: %t, want %t", got, tt.want)
			}
		})
	}
}

// A process does not know what its former one promised, nor for how long another P was then.
func TestWhoBeginsIsBoundByWhatItsFormerProcessMayHavePromised(t *testing.T) {
	now := epoch
	m := New(Config{Node: "a", Permit: oneMinute, Gossip: true, Freeze: true, Process: 1, Start: now})
	if !m.Promised(now.Add(oneMinute-1)) || m.Promised(now.Add(oneMinute)) {
		t.Error("it is not bound for P from its start")
	}
	m.Step(now, View{Cluster: plan.New(&egress.Snapshot{Longest: 2 * oneMinute})})
	if !m.Promised(now.Add(2*oneMinute-1)) || m.Promised(now.Add(2*oneMinute)) {
		t.Error("it is not bound for the longest P from its start")
	}
}

// Who was alone when etcd was lost the last time, and is not any more, has nobody's promise before it has asked.
func TestWhoHasToPromiseIsAskedAnewEachTime(t *testing.T) {
	w := newWire("a")
	w.see()
	m := w.all["a"]
	m.Step(w.now, Adopted{Revocable: true})
	m.Grant([]Permit{{Answer: true}}, true)
	m.Step(w.now, Question{})
	m.Written(w.now, w.now.Add(oneMinute))
	w.now = w.now.Add(oneMinute / 2)
	w.etcd("a")
	want := w.now.Add(oneMinute)
	w.now = w.now.Add(oneMinute / 5)
	if _, limit, err := m.Look(w.now); err != nil || !limit.Equal(want) {
		t.Errorf("permits until %v, %v; want %v after the last yes", limit, err, oneMinute)
	}
}

// An agent that holds nothing leaves etcd alone. Asked for a promise it gives one, which is always safe, and finds out
// whether it has etcd: so it holds up nobody for longer than P.
func TestWhoHoldsNothingAsksEtcdOnlyForItsPeers(t *testing.T) {
	w := newWire("a", "b")
	w.see()
	b := w.all["b"]
	b.permits.needed = false
	w.now = w.now.Add(time.Hour)
	if b.Asks(w.now) {
		t.Fatal("b holds nothing, and asks etcd")
	}
	if !w.ask("a") || !b.Promised(w.now) {
		t.Fatal("b does not know whether it has etcd, and does not promise")
	}
	if !b.Asks(w.now) {
		t.Fatal("a peer asks for promises, and b does not ask etcd")
	}
	if !b.Idle() {
		t.Error("for a peer's sake b renews its lease as if it held something")
	}
	w.now = w.now.Add(oneMinute / 10)
	w.etcd("b")
	if w.ask("a") {
		t.Error("b has etcd, and promises again")
	}
	for w.now = w.now.Add(oneMinute / 10); w.now.Before(epoch.Add(time.Hour + 3*oneMinute)); w.now = w.now.Add(oneMinute / 10) {
		if w.ask("a") != !b.Lease().Confirmed.After(w.now.Add(-oneMinute*3/10)) {
			t.Errorf("after %v b promises: %t, and etcd has answered it at %v", w.now.Sub(epoch.Add(time.Hour)), w.ask("a"), b.Lease().Confirmed.Sub(epoch.Add(time.Hour)))
		}
	}
	if w.now = w.now.Add(2 * oneMinute); b.Asks(w.now) {
		t.Error("nobody asks any more, and b goes on")
	}
}

// Who is about to have permits asks, from the round in which it finds out.
func TestWhoComesToHoldAnIPAsksEtcdFirst(t *testing.T) {
	w := newWire("a", "b")
	w.see()
	a, ip := w.all["a"], netip.MustParseAddr("10.10.0.11")
	round := func(s egress.Snapshot) (confirm bool) {
		s.Agents = map[string]egress.Agent{"a": {Node: "a"}, "b": {Node: "b"}}
		s.Pools = map[string]egress.Pool{"pool": {Name: "pool"}}
		s.Nodes = map[string]egress.Node{"a": {Name: "a"}, "b": {Name: "b"}}
		s.Egresses = map[string]egress.Policy{"web": {Name: "web", Addresses: []egress.Address{{IP: ip, ID: 1, Pool: "pool"}}}}
		a.Step(w.now, View{Cluster: plan.New(&s)})
		for _, e := range a.Step(w.now, Facts{Facts: plan.Facts{Node: "a", Uplink: plan.Link{Name: "eth0", Up: true}}, Dead: func(string) bool { return false }}) {
			_, is := e.(Confirm)
			confirm = confirm || is
		}
		return confirm
	}
	for name, s := range map[string]egress.Snapshot{
		"a lock":      {Owners: map[netip.Addr]egress.Owner{ip: {IP: ip, Node: "a", Lease: 1, Revision: 5}}},
		"a suspicion": {Suspicions: map[string]egress.Suspicion{"a": {Node: "a", Lease: egress.FormatLease(1), Revision: 5}}},
	} {
		if round(egress.Snapshot{}) || a.Asks(w.now) || !a.Idle() {
			t.Fatalf("without %s: a asks, or renews its lease as if it held something", name)
		}
		if !round(s) || !a.Asks(w.now) || a.Idle() {
			t.Errorf("with %s: a does not ask, or leaves renewals of its lease out", name)
		}
		if round(s) {
			t.Errorf("with %s: a is told to begin again", name)
		}
	}
}

// An etcd that was restored may have a lock under the revision that it had before, and this node may have given that
// lock up since.
func TestNothingIsDoneToALockByAViewOfAnotherEtcd(t *testing.T) {
	w, ip := newWire("a"), netip.MustParseAddr("10.10.0.11")
	m := w.all["a"]
	claims := func(restores int) (n int) {
		w.now = w.now.Add(time.Hour)
		s := egress.Snapshot{Restores: restores, Longest: oneMinute, Pools: map[string]egress.Pool{"pool": {Name: "pool"}}, Nodes: map[string]egress.Node{"a": {Name: "a"}},
			Agents:   map[string]egress.Agent{"a": {Node: "a", Lease: egress.FormatLease(1)}},
			Egresses: map[string]egress.Policy{"web": {Name: "web", Addresses: []egress.Address{{IP: ip, ID: 1, Pool: "pool"}}}}}
		m.Step(w.now, View{Cluster: plan.New(&s)})
		m.Step(w.now, Facts{Facts: plan.Facts{Node: "a", Uplink: plan.Link{Name: "eth0", Up: true}}, Dead: func(string) bool { return false }})
		m.Step(w.now, Programmed{Applied: true})
		for _, e := range m.Step(w.now, Settled{}) {
			if _, claim := e.(Claim); claim {
				n++
			}
		}
		return n
	}
	if claims(0) != 1 {
		t.Fatal("a free IP is not claimed")
	}
	m.Step(w.now, Confirmed{Lease: 1, Sent: w.now, Restores: 1})
	if n := claims(0); n != 0 {
		t.Errorf("etcd is another one than that of the view, by which %d IPs are claimed", n)
	}
	if n := claims(1); n != 1 {
		t.Errorf("with a view of that one %d IPs are claimed, want 1", n)
	}
}

// A node that the pool selects no more gives the IP back, and is selected again before a snapshot shows that: it still
// has the lock.
func TestWhatWasGivenBackIsNotUsedByAnOlderSnapshot(t *testing.T) {
	w, ip := newWire("a"), netip.MustParseAddr("10.10.0.11")
	m := w.all["a"]
	round := func(revision int64, selected bool) (role plan.Role, answer bool, releases []Release) {
		w.now = w.now.Add(time.Hour)
		pool := egress.Pool{Name: "pool"}
		if !selected {
			pool.NodeSelector.MatchLabels = map[string]string{"gateway": ""}
		}
		web := egress.Policy{Name: "web", Addresses: []egress.Address{{IP: ip, ID: 1, Pool: "pool"}}}
		s := egress.Snapshot{
			Longest: oneMinute, Pools: map[string]egress.Pool{"pool": pool}, Nodes: map[string]egress.Node{"a": {Name: "a"}},
			Agents:   map[string]egress.Agent{"a": {Node: "a", Lease: egress.FormatLease(1)}},
			Owners:   map[netip.Addr]egress.Owner{ip: {IP: ip, Node: "a", Lease: 1, Revision: revision}},
			Egresses: map[string]egress.Policy{"web": web},
		}
		m.Step(w.now, View{Cluster: plan.New(&s)})
		_, answer = m.May(ip)
		f := plan.Facts{Node: "a", Uplink: plan.Link{Name: "eth0", Up: true}}
		m.Step(w.now, Facts{Facts: f, Dead: func(string) bool { return false }})
		for _, e := range m.Step(w.now, Programmed{Applied: true}) {
			if r, is := e.(Release); is {
				releases = append(releases, r)
			}
		}
		return m.round.roles[ip], answer, releases
	}
	round(5, true)
	if role, _, _ := round(5, true); role != plan.Own {
		t.Fatalf("its own lock: role %v, want %v", role, plan.Own)
	}
	for _, selected := range []bool{false, true} {
		role, answer, releases := round(5, selected)
		if role != plan.None || len(releases) != 1 || releases[0].Unused || answer && selected {
			t.Errorf("selected %t: role %v, may answer %t, %+v; want it silent, and the lock given back as one that was used",
				selected, role, answer, releases)
		}
	}
	if role, _, releases := round(6, true); role != plan.Pending || len(releases) != 0 {
		t.Errorf("a new lock: role %v, %+v; want %v", role, releases, plan.Pending)
	}
}

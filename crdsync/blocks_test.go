package crdsync

import (
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// model is an etcd that takes transactions as store.Leadership.Commit has it, with a cache that may be behind.
type model struct {
	t        *testing.T
	revision int64
	now      map[string]store.Record
	shown    map[string]store.Record // by the cache, at shownAt
	shownAt  int64
}

func newModel(t *testing.T) *model {
	return &model{t: t, revision: 10, now: map[string]store.Record{}, shown: map[string]store.Record{}, shownAt: 10}
}

func (m *model) Get(key string) (store.Record, bool) { r, ok := m.shown[key]; return r, ok }

// put writes a record whatever there is.
func (m *model) put(key string, v any) {
	m.t.Helper()
	value, err := store.Encode(v)
	if err != nil {
		m.t.Fatal(err)
	}
	if text, ok := v.(string); ok {
		value = []byte(text)
	}
	m.revision++
	m.now[key] = store.Record{Value: value, Revision: m.revision}
}

func (m *model) remove(key string) {
	m.revision++
	delete(m.now, key)
}

// commit makes the changes, or says that there is a conflict.
func (m *model) commit(ops unit) (revision int64, ok bool) {
	m.t.Helper()
	seen := map[string]bool{}
	for _, op := range ops {
		if seen[op.Key] || len(ops) > maxOps {
			m.t.Fatalf("%d changes, %s twice: %t", len(ops), op.Key, seen[op.Key])
		}
		seen[op.Key] = true
		r, there := m.now[op.Key]
		if op.Absent && there || op.Revision != 0 && op.Revision != r.Revision {
			return 0, false
		}
		for key, r := range m.now {
			if op.Still != 0 && strings.HasPrefix(key, op.Key) && r.Revision > op.Still {
				return 0, false
			}
		}
	}
	m.revision++
	for _, op := range ops {
		switch {
		case op.Still != 0:
		case op.Value == nil:
			delete(m.now, op.Key)
		default:
			m.now[op.Key] = store.Record{Value: op.Value, Revision: m.revision}
		}
	}
	return m.revision, true
}

// show has the cache catch up, and an index take in what changed.
func (m *model) show(b *blocks, w *work) {
	was := m.shown
	m.shown, m.shownAt = maps.Clone(m.now), m.revision
	b.renew(m.shownAt)
	var changed []string
	for key, r := range m.shown {
		if was[key].Revision != r.Revision {
			changed = append(changed, key)
		}
	}
	for key := range was {
		if _, ok := m.shown[key]; !ok {
			changed = append(changed, key)
		}
	}
	for _, key := range changed {
		rest, members := strings.CutPrefix(key, store.MembersByNode)
		switch node, name, _ := strings.Cut(rest, "/"); {
		case members:
			b.membersChanged(m, node, name)
			w.addPods(node)
		case strings.HasPrefix(key, store.BlockPrefix):
			b.recordChanged(m, key, w)
		case strings.HasPrefix(key, store.AgentPrefix):
			if node := strings.TrimPrefix(key, store.AgentPrefix); b.agentChanged(m, node) {
				w.addPods(node)
			}
		}
	}
}

// blocks returns the blocks that there are, and fails when two have a port in common, or a block and a copy of it in
// Members disagree.
func (m *model) blocks() (out []egress.Block) {
	m.t.Helper()
	byIP := map[netip.Addr][]egress.Block{}
	for key, r := range m.now {
		if !strings.HasPrefix(key, store.BlockPrefix) {
			continue
		}
		n, err := store.DecodeBlock(key, r)
		if err != nil {
			m.t.Fatalf("%s: %v", key, err)
		}
		for _, o := range byIP[n.IP] {
			if o.Overlaps(n) {
				m.t.Fatalf("blocks %+v and %+v overlap", o, n)
			}
		}
		byIP[n.IP] = append(byIP[n.IP], n)
		out = append(out, n)
	}
	slices.SortFunc(out, store.CompareBlocks)
	return out
}

func newBlocks(size int) *blocks {
	b := &blocks{size: size, rest: blockRest}
	b.begin(10)
	return b
}

// oneEgress returns Members of one pod, and the Policy of their egress, whose IPs are of a pool.
func oneEgress(node, name string, ips ...string) (map[string]egress.Members, func(string) egress.Policy) {
	p := egress.Policy{Name: name}
	for i, text := range ips {
		p.Addresses = append(p.Addresses, egress.Address{IP: ip(text), ID: egress.ID(i + 1), Pool: "p"})
	}
	m := egress.Members{Egress: name, Node: node, Pods: []egress.Member{{Pod: "a/b", IPs: []netip.Addr{ip("10.244.0.1"), ip("fd44::1")}}}}
	return map[string]egress.Members{name: m}, func(string) egress.Policy { return p }
}

// TestABlockIsRevisedByWhatTheAgentSays has one node, and says what becomes of what it has: "first/size", - behind
// those that are retired, x behind those that are freed.
func TestABlockIsRevisedByWhatTheAgentSays(t *testing.T) {
	for name, tt := range map[string]struct {
		has     string
		taken   []span // by others
		want    int
		drained []uint16
		is      string
		lacks   int
	}{
		"the first one": {"", nil, 0, nil, "2048/256", 0},
		"the first one, of an agent that wants more":    {"", nil, 1000, nil, "2048/1024", 0},
		"a first one where there is less room":          {"", []span{{2112, 1984}, {4096, 28672}, {32768, 32768}}, 0, nil, "2048/64", 0},
		"none where there is no room":                   {"", []span{{2048, 30720}, {32768, 32768}}, 0, nil, "", 256},
		"enough":                                        {"2048/256", nil, 0, nil, "2048/256", 0},
		"as much as it wants":                           {"2048/256", nil, 256, nil, "2048/256", 0},
		"a little less":                                 {"2048/256", nil, 128, nil, "2048/256", 0},
		"more":                                          {"2048/256", nil, 512, nil, "2048/256- 2560/512", 0},
		"more, which is no power of two":                {"2048/256", nil, 600, nil, "2048/256- 3072/1024", 0},
		"more than there can be":                        {"2048/256", nil, 1 << 20, nil, "2048/256- 32768/32768", 0},
		"more, for which there is some room":            {"2048/256", []span{{3072, 1024}, {4096, 28672}, {32768, 32768}}, 1024, nil, "2048/256- 2560/512", 512 * 2},
		"more, for which there is no room":              {"2048/256", []span{{2304, 256}, {2560, 512}, {3072, 1024}, {4096, 28672}, {32768, 32768}}, 1024, nil, "2048/256", 1024},
		"still more while one drains":                   {"2048/256- 2560/512", nil, 1024, nil, "2048/256- 2560/512- 3072/1024", 0},
		"still more while two drain":                    {"2048/256- 2560/512- 3072/1024", nil, 2048, nil, "2048/256- 2560/512- 3072/1024", 0},
		"still more when one of two has drained":        {"2048/256- 2560/512- 3072/1024", nil, 2048, []uint16{2048}, "2048/256x 2560/512- 3072/1024- 4096/2048", 0},
		"less":                                          {"4096/1024", nil, 256, nil, "4096/1024- 5120/256", 0},
		"less, of which one is retired already":         {"2048/256- 4096/4096", nil, 200, nil, "2048/256 4096/4096-", 0},
		"less, and one is retired that is small enough": {"2048/1024- 4096/4096", nil, 512, nil, "2048/1024 4096/4096-", 0},
		"less, and there is no room":                    {"4096/4096", []span{{2048, 2048}, {8192, 24576}, {32768, 32768}}, 256, nil, "4096/4096", 0},
		"less while two drain":                          {"2048/64- 2112/64- 4096/4096", nil, 256, nil, "2048/64- 2112/64- 4096/4096", 0},
		"more again, while the large one drains":        {"2048/256 4096/4096-", nil, 4096, nil, "2048/256- 4096/4096", 0},
		"a retired one has drained":                     {"2048/256- 2560/512", nil, 0, []uint16{2048}, "2048/256x 2560/512", 0},
		"one that is not retired has drained":           {"2048/256- 2560/512", nil, 0, []uint16{2560}, "2048/256- 2560/512", 0},
		"one of another life has drained":               {"2560/512", nil, 0, []uint16{2048}, "2560/512", 0},
		"all are retired":                               {"2048/256- 2560/512-", nil, 0, nil, "2048/256- 2560/512", 0},
		"none is retired":                               {"2048/256 2560/512", nil, 0, nil, "2048/256- 2560/512", 0},
	} {
		m, b := newModel(t), newBlocks(256)
		for _, text := range strings.Fields(tt.has) {
			n := egress.Block{IP: ip("10.0.0.1"), Node: "n", Retired: strings.HasSuffix(text, "-")}
			if _, err := fmt.Sscanf(strings.TrimSuffix(text, "-"), "%d/%d", &n.First, &n.Size); err != nil {
				t.Fatal(err)
			}
			m.put(store.BlockKey(n.IP, n.First), n)
		}
		for _, s := range tt.taken {
			for at, end := int(s.first), int(s.first)+s.size; at < end; {
				_, size := extent(uint16(at))
				for at+size > end {
					size /= 2
				}
				m.put(store.BlockKey(ip("10.0.0.1"), uint16(at)), egress.Block{IP: ip("10.0.0.1"), First: uint16(at), Size: size, Node: "other"})
				at += size
			}
		}
		m.put(store.AgentKey("n"), egress.Agent{Node: "n", Ports: map[netip.Addr]egress.PortUse{ip("10.0.0.1"): {Want: tt.want, Drained: tt.drained}}})
		m.show(b, &work{})
		for pass := range 2 { // a second one finds nothing to do
			groups, policy := oneEgress("n", "a", "10.0.0.1")
			changes, err := b.divide("n", groups, policy, true, time.Unix(1000, 0).UTC())
			if err != nil {
				t.Fatal(err)
			}
			if pass == 1 && len(changes) > 0 {
				t.Errorf("%s: a second pass changes %v", name, changes)
			}
			if u := b.guarded(changes["a"]); len(u) > 0 {
				if _, ok := m.commit(u); !ok || len(changes) != 1 {
					t.Fatalf("%s: %v is not taken", name, changes)
				}
			}
			var is, copies []string
			for _, n := range m.blocks() {
				if n.Node != "n" {
					continue
				}
				text := fmt.Sprintf("%d/%d", n.First, n.Size)
				switch {
				case !n.Freed.IsZero():
					text += "x"
				case n.Retired:
					text += "-"
				}
				is = append(is, text)
			}
			for _, n := range groups["a"].Blocks {
				text := fmt.Sprintf("%d/%d", n.First, n.Size)
				if n.Retired {
					text += "-"
				}
				copies = append(copies, text)
			}
			if d := cmp.Diff(strings.Fields(tt.is), is); d != "" && tt.is+strings.Join(is, "") != "" {
				t.Errorf("%s, pass %d (-want +got):\n%s", name, pass, d)
			}
			live := slices.DeleteFunc(is, func(s string) bool { return strings.HasSuffix(s, "x") })
			if !slices.Equal(live, copies) {
				t.Errorf("%s: the Members list %v, want %v", name, copies, live)
			}
			if got := b.short["n"][ip("10.0.0.1")].want; got != tt.lacks {
				t.Errorf("%s, pass %d: lacks %d, want %d", name, pass, got, tt.lacks)
			}
			m.put(store.AgentKey("n"), egress.Agent{Node: "n", Ports: map[netip.Addr]egress.PortUse{ip("10.0.0.1"): {Want: tt.want}}})
			m.show(b, &work{})
		}
	}
}

func TestOnlyIPsOfPoolsWithPodsOfTheirFamilyHavePorts(t *testing.T) {
	four, six := netip.MustParseAddr("10.244.0.1"), netip.MustParseAddr("fd44::1")
	pool := egress.Policy{Addresses: []egress.Address{{IP: ip("10.0.0.1"), ID: 1, Pool: "p"}, {IP: ip("fd00::1"), ID: 2, Pool: "p"}}}
	static := egress.Policy{Addresses: []egress.Address{{IP: ip("10.0.0.1"), ID: 1}}}
	for name, tt := range map[string]struct {
		size   int
		exists bool
		egress string
		pods   []netip.Addr
		policy egress.Policy
		want   string
	}{
		"both families":    {64, true, "a", []netip.Addr{four, six}, pool, "[10.0.0.1 fd00::1]"},
		"pods of one":      {64, true, "a", []netip.Addr{six}, pool, "[fd00::1]"},
		"a static IP":      {64, true, "a", []netip.Addr{four}, static, "[]"},
		"no address":       {64, true, "a", []netip.Addr{four}, egress.Policy{}, "[]"},
		"no Node object":   {64, false, "a", []netip.Addr{four}, pool, "[]"},
		"no blocks at all": {0, true, "a", []netip.Addr{four}, pool, "[]"},
		"no egress's pods": {64, true, egress.Unselected, []netip.Addr{four}, pool, "[]"},
	} {
		b := newBlocks(tt.size)
		groups := map[string]egress.Members{tt.egress: {Egress: tt.egress, Node: "n", Pods: []egress.Member{{Pod: "a/b", IPs: tt.pods}}}}
		changes, err := b.divide("n", groups, func(string) egress.Policy { return tt.policy }, tt.exists, time.Unix(0, 0))
		var got []netip.Addr
		for _, n := range groups[tt.egress].Blocks {
			got = append(got, n.IP)
		}
		if fmt.Sprint(got) != tt.want || err != nil || (tt.want == "[]") != (len(changes) == 0) {
			t.Errorf("%s: %v, want %s; %v, %v", name, got, tt.want, changes, err)
		}
	}
}

// leader is one that writes to a model.
type leader struct {
	*model
	*blocks
	policies map[string]egress.Policy
	groups   map[string]map[string]egress.Members // node -> name
	gone     map[string]bool                      // nodes without an object
}

// pass does what mirror.pass does for some nodes. lost transactions are those that are not answered, and are returned
// to be taken later.
func (l *leader) pass(r *rand.Rand, nodes []string, at time.Time) (late []unit) {
	var units []unit
	for _, node := range nodes {
		groups := map[string]egress.Members{}
		for name, g := range l.groups[node] {
			groups[name] = g
		}
		listed := map[string]bool{}
		for key := range l.shown {
			if name, ok := strings.CutPrefix(key, store.MembersByNodeKey(node, "")); ok {
				listed[name] = true
			}
		}
		changes, err := l.divide(node, groups, func(name string) egress.Policy { return l.policies[name] }, !l.gone[node], at)
		if err != nil {
			l.t.Fatal(err)
		}
		names := maps.Clone(listed)
		for name := range groups {
			names[name] = true
		}
		for name := range changes {
			names[name] = true
		}
		for _, name := range slices.Sorted(maps.Keys(names)) {
			var u unit
			if name != "" {
				for _, key := range memberKeys(node, name) {
					was, there := l.Get(key)
					op := store.Op{Key: key, Absent: !there, Revision: was.Revision}
					if g, ok := groups[name]; ok {
						if op.Value, err = store.Encode(g); err != nil {
							l.t.Fatal(err)
						}
					}
					if op.Value == nil != !there || string(op.Value) != string(was.Value) {
						u = append(u, op)
					}
				}
			}
			if u = append(u, changes[name]...); len(u) > 0 {
				units = append(units, u)
			}
		}
	}
	units = append(units, l.rested(at)...)
	for len(units) > 0 {
		n := min(1+r.IntN(2), len(units))
		u := l.guarded(slices.Concat(units[:n]...))
		units = units[n:]
		switch r.IntN(12) {
		case 0: // no answer comes, and it is taken later, or never
			return []unit{u}
		case 1: // it is taken, and no answer comes
			l.commit(u)
			return nil
		}
		revision, ok := l.commit(u)
		if !ok {
			return nil
		}
		l.committed(u, revision)
	}
	return nil
}

// TestNoTwoBlocksEverHaveAPortInCommon has pods, IPs, nodes, agents and time do anything, in a cluster whose leaders
// read caches that are behind, lose answers, and write late.
func TestNoTwoBlocksEverHaveAPortInCommon(t *testing.T) {
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 1))
		m := newModel(t)
		start := func() *leader {
			return &leader{model: m, blocks: newBlocks(egress.MinBlock << r.IntN(6)), policies: map[string]egress.Policy{}, groups: map[string]map[string]egress.Members{}, gone: map[string]bool{}}
		}
		l := start()
		l.rest = 0
		nodes := []string{"n0", "n1", "n2", "n3", "n4", "n5"}
		ips := []string{"10.0.0.1", "10.0.0.2"}
		var late []unit
		for step := range 300 {
			at := time.Unix(int64(1000+step), 0).UTC()
			node, name := nodes[r.IntN(len(nodes))], string(rune('a'+r.IntN(3)))
			switch r.IntN(10) {
			case 0, 1: // pods come
				g, _ := oneEgress(node, name)
				if l.groups[node] == nil {
					l.groups[node] = map[string]egress.Members{}
				}
				l.groups[node][name] = g[name]
			case 2: // they go
				delete(l.groups[node], name)
			case 3: // an IP is another egress's
				address := egress.Address{IP: ip(ips[r.IntN(len(ips))]), ID: 1, Pool: "p"}
				for other, p := range l.policies {
					if slices.Contains(p.Addresses, address) {
						delete(l.policies, other)
					}
				}
				l.policies[name] = egress.Policy{Name: name, Addresses: []egress.Address{address}}
			case 4, 5: // an agent says something
				a := egress.Agent{Node: node, Ports: map[netip.Addr]egress.PortUse{}}
				for _, n := range m.blocks() {
					use := a.Ports[n.IP]
					if n.Node == node && n.Retired && n.Freed.IsZero() && r.IntN(2) == 0 {
						use.Drained = append(use.Drained, n.First)
					}
					if use.Want = 0; r.IntN(2) == 0 {
						use.Want = egress.MinBlock << r.IntN(7)
					}
					a.Ports[n.IP] = use
				}
				m.put(store.AgentKey(node), a)
			case 6:
				l.gone[node] = !l.gone[node]
			case 7: // some of what was late arrives
				if i := r.IntN(8); i < len(late) {
					m.commit(late[i])
					late = slices.Delete(late, i, i+1)
				}
			case 8:
				// another leader, which reads the cache as it is; what the former one wrote late is refused by the
				// election
				if r.IntN(4) == 0 {
					late = nil
					next := start()
					next.policies, next.groups, next.gone = l.policies, l.groups, l.gone
					next.begin(m.shownAt)
					next.rest = time.Duration(r.IntN(3)) * time.Hour
					for key := range m.shown {
						if strings.HasPrefix(key, store.BlockPrefix) {
							next.recordChanged(m, key, &work{})
						} else if rest, ok := strings.CutPrefix(key, store.MembersByNode); ok {
							node, name, _ := strings.Cut(rest, "/")
							next.membersChanged(m, node, name)
						}
					}
					l = next
				}
			}
			if r.IntN(3) > 0 {
				m.show(l.blocks, &work{})
			} else {
				l.renew(m.shownAt)
			}
			late = append(late, l.pass(r, nodes[r.IntN(len(nodes)):], at)...)
			m.blocks()
		}
		// In the end, all is as it has to be.
		for range 60 {
			m.show(l.blocks, &work{})
			for _, n := range l.byNode {
				for _, o := range n {
					o.seen = time.Time{}
				}
			}
			l.pass(r, nodes, time.Now().Add(24*time.Hour))
		}
		wantCopies(t, m, l, seed)
	}
}

// wantCopies checks that each live block is in both Members of its node, and no other is.
func wantCopies(t *testing.T, m *model, l *leader, seed uint64) {
	t.Helper()
	listed := map[blockID]int{}
	for key, r := range m.now {
		if !strings.HasPrefix(key, "members/") {
			continue
		}
		g, err := store.Decode[egress.Members](r)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.IsSortedFunc(g.Blocks, store.CompareBlocks) {
			t.Errorf("seed %d: %s: not sorted: %v", seed, key, g.Blocks)
		}
		for _, n := range g.Blocks {
			listed[blockID{n.IP, n.First}]++
			kept, err := store.DecodeBlock(store.BlockKey(n.IP, n.First), m.now[store.BlockKey(n.IP, n.First)])
			if err != nil || kept.Node != g.Node || kept.Retired != n.Retired || kept.Size != n.Size || !kept.Freed.IsZero() {
				t.Errorf("seed %d: %s lists %+v, and the record is %+v, %v", seed, key, n, kept, err)
			}
		}
	}
	perNode := map[string]int{}
	for _, n := range m.blocks() {
		if got := listed[blockID{n.IP, n.First}]; n.Freed.IsZero() && got != 2 {
			t.Errorf("seed %d: %+v is listed %d times", seed, n, got)
		}
		if n.Freed.IsZero() {
			perNode[n.Node+n.IP.String()]++
		}
	}
	for node, n := range perNode {
		if n > maxBlocks {
			t.Errorf("seed %d: %s has %d blocks", seed, node, n)
		}
	}
}

// TestALateTransactionTakesNoPortsThatAnotherBlockHas has what the keys alone would let pass: of two neighbours, one is
// written and the other is not answered; the first goes, its place and the other's are given to a larger one, and the
// unanswered transaction arrives.
func TestALateTransactionTakesNoPortsThatAnotherBlockHas(t *testing.T) {
	m, b := newModel(t), newBlocks(64)
	b.rest = 0
	divide := func(node string, wanted bool) unit {
		t.Helper()
		groups, policy := oneEgress(node, "a", "10.0.0.1")
		if !wanted {
			groups = nil
		}
		changes, err := b.divide(node, groups, policy, true, time.Unix(1000, 0).UTC())
		if err != nil {
			t.Fatal(err)
		}
		return slices.Concat(changes["a"], changes[""])
	}
	commit := func(u unit) {
		t.Helper()
		u = b.guarded(u)
		revision, ok := m.commit(u)
		if !ok {
			t.Fatalf("%v is not taken", u)
		}
		b.committed(u, revision)
	}
	first, second := divide("n1", true), divide("n2", true)
	commit(first)
	late := b.guarded(second) // it is on its way
	m.show(b, &work{})
	commit(divide("n1", false))
	m.show(b, &work{})
	for _, u := range b.rested(time.Now()) {
		commit(u)
	}
	m.put(store.AgentKey("n3"), egress.Agent{Node: "n3", Ports: map[netip.Addr]egress.PortUse{ip("10.0.0.1"): {Want: 128}}})
	m.show(b, &work{})
	commit(divide("n3", true))
	if _, ok := m.commit(late); ok || len(m.blocks()) != 1 || m.blocks()[0].Size != 128 || m.now["blocks/10.0.0.1/02112"].Revision != 0 {
		t.Errorf("taken: %t; blocks %+v", ok, m.blocks())
	}
	// The other way round: it arrives first, and the cache has not shown it.
	m, b = newModel(t), newBlocks(64)
	divide("n1", true) // which is not written
	commit(divide("n2", true))
	b.renew(m.shownAt)
	delete(b.planned, ip("10.0.0.1"))
	if u := b.guarded(divide("n3", true)); len(u) == 0 {
		t.Error("nothing to write")
	} else if _, ok := m.commit(u); ok {
		t.Errorf("%v is taken, with blocks %+v", u, m.blocks())
	}
	m.show(b, &work{})
	commit(divide("n3", true))
	if len(m.blocks()) != 2 {
		t.Errorf("blocks %+v", m.blocks())
	}
}

func TestARecordThatIsLostOrUnreadableGivesNoPortsAway(t *testing.T) {
	for name, spoil := range map[string]func(m *model){
		"lost":    func(m *model) { m.remove("blocks/10.0.0.1/02048") },
		"no JSON": func(m *model) { m.put("blocks/10.0.0.1/02048", "no JSON") },
		"another port": func(m *model) {
			m.put("blocks/10.0.0.1/02048", egress.Block{IP: ip("10.0.0.1"), First: 4096, Size: 64, Node: "n1"})
		},
		"of nobody": func(m *model) {
			m.put("blocks/10.0.0.1/02048", egress.Block{IP: ip("10.0.0.1"), First: 2048, Size: 64})
		},
		"lost, and one copy is, too": func(m *model) { m.remove("blocks/10.0.0.1/02048"); m.put("members/by-node/n1/a", "no JSON") },
		"no JSON, and no copy is left": func(m *model) {
			m.put("blocks/10.0.0.1/02048", "no JSON")
			m.remove("members/by-node/n1/a")
			m.remove("members/by-egress/a/n1")
		},
	} {
		m, b := newModel(t), newBlocks(64)
		l := &leader{model: m, blocks: b, policies: map[string]egress.Policy{}, groups: map[string]map[string]egress.Members{}}
		groups, policy := oneEgress("n1", "a", "10.0.0.1")
		l.groups["n1"], l.policies["a"] = groups, policy("a")
		settled := func(nodes ...string) {
			for range 5 {
				m.show(b, &work{})
				for range 30 { // some are not answered
					l.pass(rand.New(rand.NewPCG(1, 2)), nodes, time.Unix(1000, 0).UTC())
					m.show(b, &work{})
				}
			}
		}
		settled("n1")
		was := m.blocks()
		if len(was) != 1 || was[0].First != 2048 {
			t.Fatalf("blocks %+v", was)
		}
		spoil(m)
		kept := !strings.Contains(name, "no copy")
		// Another node comes first.
		groups, _ = oneEgress("n2", "a")
		l.groups["n2"] = groups
		m.show(b, &work{})
		faults := map[string]error{}
		b.reported(faults)
		if reported := faults["blocks/10.0.0.1/02048"] != nil; reported == strings.HasPrefix(name, "lost") {
			t.Errorf("%s: faults %v", name, faults)
		}
		settled("n2")
		if !kept {
			l.groups["n1"] = nil
		}
		settled("n1")
		now := map[uint16]string{}
		for key, r := range m.now {
			if n, err := store.DecodeBlock(key, r); err == nil && strings.HasPrefix(key, store.BlockPrefix) {
				now[n.First] = n.Node
			}
		}
		want := map[uint16]string{2048: "n1", 2112: "n2"}
		if !kept { // it may be one of 2,048 ports
			want = map[uint16]string{4096: "n2"}
		}
		if d := cmp.Diff(want, now); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
		b.reported(faults)
		if kept {
			wantCopies(t, m, l, 0)
		}
	}
}

func TestBlocksThatOverlapAreReported(t *testing.T) {
	m, b := newModel(t), newBlocks(64)
	for i, n := range []egress.Block{{First: 2048, Size: 1024}, {First: 3008, Size: 64}, {First: 3072, Size: 64}} {
		n.IP, n.Node = ip("10.0.0.1"), fmt.Sprintf("n%d", i)
		m.put(store.BlockKey(n.IP, n.First), n)
	}
	m.show(b, &work{})
	faults := map[string]error{}
	b.reported(faults)
	if err := faults["blocks/10.0.0.1/03008"]; len(faults) != 1 || err == nil || !strings.Contains(err.Error(), "overlaps with the block from 2048, of node n0") {
		t.Errorf("faults %v", faults)
	}
	m.remove("blocks/10.0.0.1/03008")
	m.show(b, &work{})
	clear(faults)
	if b.reported(faults); len(faults) != 0 {
		t.Errorf("it is gone: faults %v", faults)
	}
}

// TestWhoHadAPortIsKnownWhenTheBlockIsAnothers has pods, agents and time do anything, and then asks of each moment
// whose each port was.
func TestWhoHadAPortIsKnownWhenTheBlockIsAnothers(t *testing.T) {
	type moment struct {
		ip   netip.Addr
		port uint16
		at   time.Time
	}
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 15))
		m := newModel(t)
		l := &leader{model: m, blocks: newBlocks(64), policies: map[string]egress.Policy{}, groups: map[string]map[string]egress.Members{}, gone: map[string]bool{}}
		l.rest, l.history = 3*time.Second, &blockHistory{log: slog.New(slog.DiscardHandler)}
		for i, name := range []string{"a", "b"} {
			l.policies[name] = egress.Policy{Name: name, Addresses: []egress.Address{{IP: ip(fmt.Sprintf("10.0.0.%d", 1+i)), ID: egress.ID(1 + i), Pool: "p"}}}
		}
		truth := map[moment]string{}
		kept := 0
		for step := range 200 {
			at := time.Unix(int64(1000+step), 0).UTC()
			node, name := fmt.Sprintf("n%d", r.IntN(3)), string(rune('a'+r.IntN(2)))
			if groups, _ := oneEgress(node, name); r.IntN(2) == 0 {
				l.groups[node] = groups
			} else {
				delete(l.groups, node)
			}
			m.show(l.blocks, &work{})
			for id, n := range l.resting { // it rests by the clock of this test
				n.seen = l.byIP[id.ip][id.first].Freed
			}
			l.pass(r, []string{node}, at)
			for _, n := range m.blocks() {
				if n.Freed.IsZero() {
					truth[moment{n.IP, n.First, at}] = n.Node + " " + n.Egress
				}
			}
		}
		var tenures []egress.BlockTenure
		for _, n := range m.blocks() {
			tenures = append(tenures, n.Tenure())
		}
		for key, record := range m.now {
			if strings.HasPrefix(key, store.BlockHistoryPrefix) {
				n, err := store.DecodeBlockTenure(key, record)
				if err != nil {
					t.Fatal(err)
				}
				tenures = append(tenures, n)
				kept++
			}
		}
		for asked, want := range truth {
			var got []string
			for _, n := range tenures {
				if n.IP == asked.ip && n.Has(asked.port, asked.at) {
					got = append(got, n.Node+" "+n.Egress)
				}
			}
			if len(got) != 1 || got[0] != want {
				t.Fatalf("seed %d: %s:%d at %v was of %q, want %s alone", seed, asked.ip, asked.port, asked.at, got, want)
			}
		}
		if kept < 5 || len(truth) < 100 {
			t.Errorf("seed %d: %d tenures, %d moments: nothing was tried", seed, kept, len(truth))
		}
	}
}

func TestHistoryIsNoReasonToKeepABlock(t *testing.T) {
	m, b := newModel(t), newBlocks(64)
	b.history = &blockHistory{log: slog.New(slog.DiscardHandler), most: 1}
	freed := time.Unix(1000, 0).UTC()
	for _, first := range []uint16{2048, 2112} {
		m.put(store.BlockKey(ip("10.0.0.1"), first), egress.Block{IP: ip("10.0.0.1"), First: first, Size: 64, Node: "n1", Since: freed.Add(-time.Hour), Freed: freed})
	}
	m.show(b, &work{})
	for pass := range 2 {
		u := b.rested(time.Now().Add(time.Hour))[0]
		if want := 2 - pass; len(u) != want { // the second one finds the history full
			t.Errorf("pass %d: %d changes, want %d", pass, len(u), want)
		}
		revision, ok := m.commit(u)
		if !ok {
			t.Fatalf("%v is not taken", u)
		}
		b.committed(u, revision)
	}
	if n := len(m.blocks()); n != 0 || !b.history.full.Load() {
		t.Errorf("%d blocks are left, full: %t", n, b.history.full.Load())
	}
}

// TestAMembersUnitWithHistoryIsDividedByEgress: where etcd refuses one egress's Members, all others are written,
// whatever goes with them.
func TestAMembersUnitWithHistoryIsDividedByEgress(t *testing.T) {
	of := func(name string) unit {
		return unit{{Key: "members/by-node/n/" + name}, {Key: "members/by-egress/" + name + "/n"}, {Key: "blocks/10.0.0.1/02048"}, {Key: "blocks-history/10.0.0.1/02048/x-y"}}
	}
	if pairs := slices.Concat(of("a"), of("b")).pairs(); len(pairs) != 2 || len(pairs[0]) != 4 || len(pairs[1]) != 4 {
		t.Errorf("divided into %v", pairs)
	}
}

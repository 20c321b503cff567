package nft

import (
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/internal/netns"
)

// tablesOf returns what is observed, without what no State decides.
func tablesOf(o Observed) []observedTable {
	out := slices.Clone(o.tables)
	for i := range out {
		out[i].packets = nil
		out[i].elements = maps.Clone(out[i].elements)
		maps.DeleteFunc(out[i].elements, func(_ string, e elements) bool { return len(e) == 0 })
	}
	return out
}

// remembers reports whether the next Observe returns what is known: something that is not so is made part of it.
func remembers(t *testing.T, tables *Tables) bool {
	t.Helper()
	const never = "no such set"
	tables.observing.Lock()
	for _, known := range tables.observed.tables[:1] {
		known.elements[never] = elements{}
	}
	tables.observing.Unlock()
	_, there := observe(t, tables).tables[0].elements[never]
	return there
}

// What Apply has written is what the kernel holds.
func TestWhatWasWrittenIsKnown(t *testing.T) {
	tables := open(t)
	addOverlay(t)
	states := goldens(t)
	names := slices.Sorted(maps.Keys(states))
	reach(t, tables, states[names[0]])
	tables.events.lag = time.Minute // an emulated machine is slow
	watch(t, tables)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	steps, known := 60, 0
	if testing.Short() {
		steps = 6
	}
	var want State
	for i := range steps {
		if i%6 == 0 {
			want = states[names[random.IntN(len(names))]] // tables may be made anew
			want.Pods = maps.Clone(want.Pods)
		} else if pod := netip.AddrFrom4([4]byte{10, 244, 255, byte(random.IntN(3))}); want.Pods[pod] == 0 {
			want.Pods = mapPut(want.Pods, pod, 5)
		} else {
			delete(want.Pods, pod)
		}
		if err := tables.Apply(Diff(observe(t, tables), want)); err != nil {
			t.Fatal(err)
		}
		if random.IntN(2) == 0 {
			nft(t, foreign)
			netns.Run(t, "nft delete table inet foreign")
		}
		if len(tables.observed.tables) > 0 && remembers(t, tables) {
			known++
			delete(tables.observed.tables[0].elements, "no such set")
		}
		have, kernel := observe(t, tables), observe(t, openHere(t, Config{Shared: true}))
		if diff := cmp.Diff(tablesOf(kernel), tablesOf(have), cmp.AllowUnexported(observedTable{}, observedChain{}, observedHook{}, observedSet{})); diff != "" {
			t.Fatalf("(-kernel +known):\n%s", diff)
		}
	}
	t.Logf("%d of %d were known", known, steps)
	if known < steps/2 {
		t.Errorf("%d of %d were known, want half of them at least", known, steps)
	}
}

// What others do to our tables is read; what they do to theirs is not, as long as Watch says which is which.
func TestOthersCommitsAreReadWhereTheyAreAboutOurTables(t *testing.T) {
	tables := openShared(t)
	tables.events.lag = time.Minute // an emulated machine is slow
	reach(t, tables, large(5))
	if observe(t, tables); !remembers(t, tables) {
		t.Error("nobody wrote anything, and the tables are read again")
	}
	nft(t, foreign)
	if remembers(t, tables) {
		t.Error("without Watch nobody knows whose tables were changed, and they are not read again")
	}
	watch(t, tables)
	eventually(t, "Watch does not run", func() bool {
		tables.events.mu.Lock()
		defer tables.events.mu.Unlock()
		return tables.events.running
	})
	netns.Run(t, "nft delete table inet foreign")
	if remembers(t, tables) {
		t.Error("what came before Watch began is not known, and the tables are not read again")
	}
	nft(t, foreign)
	if !remembers(t, tables) {
		t.Error("the tables of others were changed, and ours are read again")
	}
	for range 20 {
		if err := tables.Permit([]Permit{{IP: ip4, Answer: true}}, time.Second); err != nil {
			t.Fatal(err)
		}
		if !remembers(t, tables) {
			t.Error("a permit was renewed, and the tables are read again")
		}
	}
	for _, damage := range []string{"flush chain inet egret guard", "add element inet egret pod4 { 10.244.9.9 : 7 }", "flush ruleset"} {
		nft(t, damage)
		if len(tables.observed.tables) > 0 && remembers(t, tables) {
			t.Errorf("after %s the tables are not read again", damage)
		}
		reach(t, tables, large(5))
		if observe(t, tables); !remembers(t, tables) {
			t.Errorf("after %s was mended the tables are read again and again", damage)
		}
	}
	tables.wholeAt = time.Now().Add(-wholeEvery)
	if remembers(t, tables) {
		t.Errorf("after %v the tables are not read again", wholeEvery)
	}
}

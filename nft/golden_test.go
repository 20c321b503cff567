package nft

import (
	"flag"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"

	"github.com/egret-project/egret/internal/netns"
	"github.com/egret-project/egret/internal/tour"
)

var (
	update = flag.Bool("update", false, "write the goldens of testdata anew")
	seed   = flag.Int64("seed", 0, "seed of the random orders; 0: the time")
)

func section(golden []byte, name string) string {
	for _, f := range txtar.Parse(golden).Files {
		if f.Name == name {
			return string(f.Data)
		}
	}
	return ""
}

// TestGoldens checks, for the state of every golden, the lines of Changes and what the real nft lists once they are
// applied. The golden "ruleset" has all of it; the others, only sets that hold something and the lines that fill them:
// the rest is the same.
func TestGoldens(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			tables := openWithOverlay(t)
			golden, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			c := reach(t, tables, parseState(t, section(golden, "state")))
			lines, listed := c.String(), list(t)
			if filepath.Base(file) != "ruleset.txtar" {
				lines, listed = elementLines(lines), filled(listed)
			}
			a := txtar.Parse(golden)
			a.Files = []txtar.File{
				{Name: "state", Data: []byte(section(golden, "state"))},
				{Name: "lines", Data: []byte(lines)},
				{Name: "list", Data: []byte(listed)},
			}
			got := txtar.Format(a)
			if *update {
				if err := os.WriteFile(file, got, 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if diff := cmp.Diff(string(golden), string(got)); diff != "" {
				t.Errorf("differs from golden; -update rewrites it (-want +got):\n%s", diff)
			}
		})
	}
}

// elementLines returns the lines that add elements.
func elementLines(lines string) string {
	var b strings.Builder
	for l := range strings.Lines(lines) {
		if strings.HasPrefix(l, "add element ") || strings.HasPrefix(l, "add limit ") {
			b.WriteString(l)
		}
	}
	return b.String()
}

// openWithOverlay returns Tables in a network namespace with what States with peers need, that others may write to.
func openWithOverlay(t *testing.T) *Tables {
	tables := openShared(t)
	addOverlay(t)
	return tables
}

func addOverlay(t *testing.T) { netns.Run(t, "ip link add egret.vx type bridge") }

var setBlock = regexp.MustCompile(`(?ms)^\t(set|map|limit) .*?^\t}\n`)

// filled returns the sets and maps that hold something, by table.
func filled(listed string) string {
	var b strings.Builder
	starts := header.FindAllStringIndex(listed, -1)
	for i, at := range starts {
		end := len(listed)
		if i+1 < len(starts) {
			end = starts[i+1][0]
		}
		b.WriteString(listed[at[0]:at[1]])
		for _, block := range setBlock.FindAllString(listed[at[1]:end], -1) {
			if strings.Contains(block, "elements = ") || strings.HasPrefix(block, "\tlimit ") {
				b.WriteString(block)
			}
		}
	}
	return b.String()
}

// The lines are documentation and what an operator sees in the log. They must mean what the messages beside them say.
func TestNftMakesOfTheLinesWhatApplyMakesOfTheMessages(t *testing.T) {
	for name, s := range goldens(t) {
		t.Run(name, func(t *testing.T) {
			tables := openWithOverlay(t)
			c := reach(t, tables, s)
			want := withoutRaw(list(t))
			netns.Enter(t)
			addOverlay(t)
			nft(t, withoutRaw(c.String()))
			if diff := cmp.Diff(want, list(t)); diff != "" {
				t.Errorf("nft -f of the lines (-messages +lines):\n%s", diff)
			}
		})
	}
}

// withoutRaw drops the rules that nft prints and does not take, or prints in other words than it takes: it has no
// address in a raw payload expression, and knows neither the unit of a port nor the protocols that have some.
func withoutRaw(lines string) string {
	var b strings.Builder
	for l := range strings.Lines(lines) {
		if !rawLine.MatchString(l) {
			b.WriteString(l)
		}
	}
	return b.String()
}

var rawLine = regexp.MustCompile(`@(th|ll|nh),|<< 16|l4proto [{] .*sctp|echo-re|& 65472`)

// shortWalk is how many steps a short walk takes.
const shortWalk = 12

// Every state is reached from every other one, in random order; with -short, which is for emulated machines, a few are.
func TestWalk(t *testing.T) {
	tables := open(t)
	addOverlay(t)
	states := goldens(t)
	if *seed == 0 {
		*seed = time.Now().UnixNano()
	}
	t.Logf("-seed=%d", *seed)
	names := slices.Sorted(maps.Keys(states))
	walk := tour.New(rand.New(rand.NewPCG(uint64(*seed), 0)), len(names))
	if testing.Short() {
		walk = walk[:shortWalk]
	}

	want := map[int]string{} // what is listed where there was nothing before
	for _, i := range walk {
		if want[i] == "" {
			if err := tables.Delete(); err != nil {
				t.Fatal(err)
			}
			reach(t, tables, states[names[i]])
			want[i] = list(t)
		}
	}
	from := "the last of these"
	for _, i := range walk {
		c := reach(t, tables, states[names[i]])
		if diff := cmp.Diff(want[i], list(t)); diff != "" {
			t.Fatalf("on the way from %s to %s (-want +got):\n%safter:\n%s", from, names[i], diff, c)
		}
		from = names[i]
	}
}

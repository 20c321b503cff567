package routing

import (
	"encoding/json"
	"flag"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"regexp"
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

// open returns a Router of a new namespace, which the calling goroutine is in from then on.
func open(t *testing.T) *Router {
	t.Helper()
	netns.Enter(t)
	batch(t, "ip", "link add up0 type veth peer name up1", "link set up0 up", "link set up1 up") // for subnets
	r, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

func observe(t *testing.T, r *Router) Observed {
	t.Helper()
	o, err := r.Observe()
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// reach makes the kernel equal to want, makes the same changes once more, checks that nothing is left to do, and
// returns the changes.
func reach(t *testing.T, r *Router, want State) Changes {
	t.Helper()
	c := Diff(observe(t, r), want)
	for _, part := range []Changes{c.Links(), c.Entries(), c.Locals(), c.Removes(), c} {
		if err := r.Apply(part); err != nil {
			t.Fatalf("applying\n%s%v", part, err)
		}
	}
	if left := Diff(observe(t, r), want); !left.Empty() {
		t.Fatalf("still to do:\n%s", left)
	}
	return c
}

func parseState(t *testing.T, text string) State {
	t.Helper()
	var s State
	d := json.NewDecoder(strings.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		t.Fatalf("state: %v", err)
	}
	return s
}

// sections returns the golden's sections by name.
func sections(t *testing.T, file string) map[string]string {
	t.Helper()
	a, err := txtar.ParseFile(file)
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]string{}
	for _, f := range a.Files {
		m[f.Name] = string(f.Data)
	}
	return m
}

// made finds how a link was made in the output of ip -d.
var made = regexp.MustCompile(`> mtu \d+|link/ether \S+|vxlan id .* gbp|addrgenmode \w+|<[^>]+`)

// listing is what the real ip and bridge print of the namespace, rules of others included. Only rules come in an order
// that counts. It starts six processes, however many links there are.
func listing(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	show := func(line, printed string) { b.WriteString("# " + line + "\n" + strings.Join(unordered(printed), "")) }
	for _, f := range families {
		printed := shown(t, "ip "+f.option, "rule", "route show table all proto 94")
		b.WriteString("# ip " + f.option + " rule\n" + printed[0])
		show("ip "+f.option+" route show table all proto 94", printed[1])
	}
	var devs, neighs, links []string
	for _, dev := range []string{"egret.vx", "egret.vo", "egret.vi"} {
		if _, err := net.InterfaceByName(dev); err != nil {
			continue
		}
		devs = append(devs, dev)
		neighs, links = append(neighs, "neigh show dev "+dev+" nud permanent"), append(links, "link show "+dev)
	}
	neigh, link, addrs := shown(t, "ip", neighs...), shown(t, "ip -d", links...), netns.Run(t, "ip -br addr")
	for i, dev := range devs {
		show("ip "+neighs[i], neigh[i])
		if dev == "egret.vx" {
			show("bridge fdb show dev "+dev, netns.Run(t, "bridge fdb show dev "+dev))
		}
		show("ip -br addr show dev "+dev, regexp.MustCompile(`(?m)^`+dev+`[@ ].*\n`).FindString(addrs))
		b.WriteString("# ip -d " + links[i] + "\n" + strings.Join(made.FindAllString(link[i], -1), "\n") + "\n")
		filter, err := os.ReadFile("/proc/sys/net/ipv4/conf/" + dev + "/rp_filter")
		if err != nil {
			t.Fatal(err)
		}
		b.WriteString("# sysctl net/ipv4/conf/" + dev + "/rp_filter\n" + string(filter))
	}
	return trailing.ReplaceAllString(b.String(), "\n")
}

var trailing = regexp.MustCompile(` +\n`)

// TestGoldens checks, for the state of every golden, the lines of Changes in an empty namespace and what the real ip
// and bridge list once they are applied.
func TestGoldens(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("%d goldens: %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			r := open(t)
			golden, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			state := sections(t, file)["state"]
			want := parseState(t, state)
			c := reach(t, r, want)
			if pure := Diff(Observed{}, want); pure.String() != c.String() {
				t.Errorf("an empty namespace is not the zero Observed (-zero +empty):\n%s", cmp.Diff(pure.String(), c.String()))
			}
			got := txtar.Format(&txtar.Archive{Comment: txtar.Parse(golden).Comment, Files: []txtar.File{
				{Name: "state", Data: []byte(state)}, {Name: "lines", Data: []byte(c.String())}, {Name: "listing", Data: []byte(listing(t))},
			}})
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

// TestTheLinesDoWhatApplyDoes gives the lines of every golden to a shell.
func TestTheLinesDoWhatApplyDoes(t *testing.T) {
	files, _ := filepath.Glob("testdata/*.txtar")
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			r := open(t)
			s := sections(t, file)
			var lines strings.Builder
			for line := range strings.Lines(s["lines"]) {
				if !strings.Contains(line, " route del local ") { // there is no such address here
					lines.WriteString(line)
				}
			}
			netns.RunAll(t, "", lines.String())
			if left := Diff(observe(t, r), parseState(t, s["state"])); !left.Empty() {
				t.Errorf("still to do:\n%s", left)
			}
		})
	}
}

// TestWalk reaches the state of every golden from that of every other, in random order; with -short, which is for
// emulated machines, each from one.
func TestWalk(t *testing.T) {
	if *seed == 0 {
		*seed = time.Now().UnixNano()
	}
	t.Logf("-seed=%d", *seed)
	random := rand.New(rand.NewPCG(uint64(*seed), 0))
	files, _ := filepath.Glob("testdata/*.txtar")
	walk := tour.New(random, len(files))
	if testing.Short() {
		walk = random.Perm(len(files))
		walk = append(walk, walk[0])
	}
	r := open(t)
	from := "nothing"
	for _, i := range walk {
		s := sections(t, files[i])
		c := reach(t, r, parseState(t, s["state"]))
		if diff := cmp.Diff(unordered(s["listing"]), unordered(listing(t))); diff != "" {
			t.Fatalf("%s after %s:\n%s(-want +got):\n%s", files[i], from, c, diff)
		}
		from = files[i]
	}
}

// What makes an egress IP local makes the kernel answer for it: it is a part of its own, for when the address guard is
// in place.
func TestWhatMakesAnAddressLocalIsAPartOfItsOwn(t *testing.T) {
	r := open(t)
	want := parseState(t, sections(t, "testdata/blocks.txtar")["state"])
	c := Diff(observe(t, r), want)
	for name, part := range map[string]Changes{"links": c.Links(), "entries": c.Entries()} {
		if strings.Contains(part.String(), "local 10.10.0.50") {
			t.Errorf("%s:\n%s", name, part)
		}
	}
	if !strings.Contains(c.Locals().String(), "ip -4 route add local 10.10.0.50/32 dev lo table 15188") {
		t.Errorf("locals:\n%s", c.Locals())
	}
	reach(t, r, want)
	if got := observe(t, r).Locals(); len(got) != 2 {
		t.Errorf("local are %v, want both", got)
	}
	want.Addresses = nil
	if c := Diff(observe(t, r), want); strings.Count(c.NoLocals().String(), " del local ") != 2 || strings.Count(c.NoLocals().String(), "\n") != 2 {
		t.Errorf("no more local:\n%s", c.NoLocals())
	}
}

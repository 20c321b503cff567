package store

import (
	"fmt"
	"maps"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/egress"
)

// claimed is what comes of a claim: whether the lock is the claimer's, and what its record says of the owner before.
type claimed struct {
	OK, Suspicion bool
	Node, From    string
}

// manyClaims makes 70 locks of all that a claimer may find, has n2 claim them by take, and returns what came of it,
// with how many revisions of etcd it took.
func manyClaims(t *testing.T, c *Client, blocked map[string]bool, take func(l *Lease, list []Want) ([]bool, error)) (out map[string]claimed, revisions int64) {
	t.Helper()
	dead, own, other := grant(t, c, time.Minute), grant(t, c, time.Minute), grant(t, c, time.Minute)
	if err := c.PutAgent(t.Context(), dead, egress.Agent{Node: "n1", Revocable: true, Suspectable: true}, whatever); err != nil {
		t.Fatal(err)
	}
	var list []Want
	names := map[netip.Addr]string{}
	var suspects []int
	ip := netip.MustParseAddr("10.0.0.0")
	for i := range 70 {
		ip = ip.Next()
		name := []string{"never owned", "given back", "given back unused", "died", "given back, then died", "another has it", "its own already"}[i%7]
		if blocked != nil && blocked[name] {
			name = "died"
		}
		names[ip] = fmt.Sprint(name, " ", i)
		w := Want{Owner: egress.Owner{IP: ip, Node: "n2", Why: egress.ReasonClaim}}
		by := func(l *Lease, node string) egress.Owner {
			claim(t, c, l, egress.Owner{IP: ip, Node: node, Why: egress.ReasonClaim})
			o, err := DecodeOwner(record(t, c, OwnerKey(ip)))
			if err != nil {
				t.Fatal(err)
			}
			w.Former.Revision = o.Revision
			return o
		}
		back := func(o egress.Owner, release func(egress.Owner) (bool, error)) {
			if ok, err := release(o); !ok || err != nil {
				t.Fatal(ok, err)
			}
		}
		release := func(o egress.Owner) (bool, error) { return c.Release(t.Context(), o) }
		switch name {
		case "given back":
			back(by(other, "n3"), release)
		case "given back unused":
			back(by(other, "n3"), func(o egress.Owner) (bool, error) { return c.ReleaseUnused(t.Context(), o) })
		case "died":
			by(dead, "n1")
			suspects = append(suspects, len(list))
		case "given back, then died":
			back(by(other, "n3"), release)
			by(dead, "n1")
			suspects = append(suspects, len(list))
		case "another has it":
			by(other, "n3")
		case "its own already":
			by(own, "n2")
		}
		list = append(list, w)
	}
	s := egress.Suspicion{Node: "n1", Lease: egress.FormatLease(dead.ID()), By: "n2", Since: time.Now().UTC()}
	if ok, err := c.Suspect(t.Context(), s, 1<<40); !ok || err != nil {
		t.Fatal(ok, err)
	}
	s.Revision = record(t, c, SuspicionKey("n1")).Revision
	for _, i := range suspects {
		list[i].Former.Suspicion = s
	}
	if err := c.Revoke(t.Context(), dead.ID()); err != nil {
		t.Fatal(err)
	}
	revision := func() int64 {
		resp, err := c.etcd.Get(t.Context(), "x")
		if err != nil {
			t.Fatal(err)
		}
		return resp.Header.Revision
	}
	before := revision()
	ok, err := take(own, list)
	if err != nil {
		t.Fatal(err)
	}
	revisions = revision() - before
	out = map[string]claimed{}
	for i, w := range list {
		o, err := DecodeOwner(record(t, c, OwnerKey(w.Owner.IP)))
		if err != nil {
			t.Fatal(err)
		}
		out[names[w.Owner.IP]] = claimed{ok[i], o.Suspicion == s.Revision, o.Node, o.From}
	}
	return out, revisions
}

func record(t *testing.T, c *Client, key string) Record {
	t.Helper()
	list, err := c.List(t.Context(), key)
	if err != nil || len(list) != 1 {
		t.Fatalf("%s: %v, %v", key, list, err)
	}
	return list[key]
}

// Locks that are taken together come to those who get them as they would one by one, also where others among them are
// somebody's.
func TestLocksThatAreTakenTogetherAreTakenAsEachAlone(t *testing.T) {
	s := start(t)
	one := func(c *Client) func(*Lease, []Want) ([]bool, error) {
		return func(l *Lease, list []Want) (ok []bool, err error) {
			for _, w := range list {
				done, err := c.Claim(t.Context(), l, w.Owner, w.Former)
				if err != nil {
					return nil, err
				}
				ok = append(ok, done)
			}
			return ok, nil
		}
	}
	all := func(c *Client) func(*Lease, []Want) ([]bool, error) {
		return func(l *Lease, list []Want) ([]bool, error) {
			ok, err := c.ClaimAll(t.Context(), l, list)
			for i, w := range list {
				if o, bad := DecodeOwner(record(t, c, OwnerKey(w.Owner.IP))); ok[i] && (bad != nil || o.From != w.Owner.From) {
					t.Errorf("%s is said to come from %q, and in the record from %q, %v", o.IP, w.Owner.From, o.From, bad)
				}
			}
			return ok, err
		}
	}
	for name, tt := range map[string]struct {
		blocked map[string]bool
		want    int64 // revisions
	}{
		"some of them are somebody's": {nil, 50},
		"all are free":                {map[string]bool{"another has it": true, "its own already": true}, (70 + claimBatch - 1) / claimBatch},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := dialConfig(t, Config{Endpoints: []string{s.Endpoint()}, Prefix: name + "/a"}), dialConfig(t, Config{Endpoints: []string{s.Endpoint()}, Prefix: name + "/b"})
			want, _ := manyClaims(t, a, tt.blocked, one(a))
			got, revisions := manyClaims(t, b, tt.blocked, all(b))
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-one by one +together):\n%s", diff)
			}
			kinds := map[claimed]bool{}
			for c := range maps.Values(got) {
				kinds[c] = true
			}
			if len(kinds) < 3 {
				t.Errorf("of %d kinds, want at least from nobody, from n3, and of a suspicion: %v", len(kinds), kinds)
			}
			if revisions > tt.want {
				t.Errorf("took %d revisions, want %d at most", revisions, tt.want)
			}
		})
	}
}

func TestACordonedNodeTakesNoneOfMany(t *testing.T) {
	c := dial(t, start(t))
	if err := c.Cordon(t.Context(), egress.Cordon{Node: "n2"}); err != nil {
		t.Fatal(err)
	}
	list := []Want{{Owner: egress.Owner{IP: ip1, Node: "n2", Why: egress.ReasonClaim}}, {Owner: egress.Owner{IP: ip2, Node: "n2", Why: egress.ReasonClaim}}}
	if ok, err := c.ClaimAll(t.Context(), grant(t, c, time.Minute), list); err != nil || ok[0] || ok[1] {
		t.Errorf("claimed %v, %v", ok, err)
	}
	list[1].Owner.Why = egress.ReasonStatic
	if ok, err := c.ClaimAll(t.Context(), grant(t, c, time.Minute), list); err != nil || ok[0] || !ok[1] {
		t.Errorf("claimed %v, %v, want the static one alone", ok, err)
	}
	if ok, err := c.ClaimAll(t.Context(), grant(t, c, time.Minute), nil); len(ok) > 0 || err != nil {
		t.Errorf("nothing: %v, %v", ok, err)
	}
}

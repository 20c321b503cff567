package crdsync

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/store"
)

func TestTransactionsKeepUnitsWholeAndInOrder(t *testing.T) {
	op := func(n, bytes int) store.Op { return store.Op{Key: fmt.Sprint(n), Value: make([]byte, bytes)} }
	var units []unit
	n := 0
	for _, size := range []int{1, 119, 1, 60, 60, 2, 118} {
		var u unit
		for range size {
			u = append(u, op(n, 10))
			n++
		}
		units = append(units, u)
	}
	units = append(units, unit{op(n, maxBytes-100)}, unit{op(n+1, 200)})
	var got []int
	next := 0
	for len(units) > 0 {
		b := slices.Concat(units[:fits(units)]...)
		units = units[fits(units):]
		got = append(got, len(b))
		for _, o := range b {
			if o.Key != fmt.Sprint(next) {
				t.Fatalf("change %s where %d has to be", o.Key, next)
			}
			next++
		}
	}
	if want := "[120 61 62 118 1 1]"; fmt.Sprint(got) != want {
		t.Errorf("changes per transaction: got %v, want %s", got, want)
	}
}

// A version without blocks has left those of a node whose pods are gone: freed all at once, they are more than fit one
// transaction.
func TestBlocksThatBelongToNoMembersAreWrittenAnIPAtATime(t *testing.T) {
	for _, ips := range []int{3, 200} {
		var free unit
		for i := range ips {
			key := fmt.Sprintf("%s10.10.0.%d/", store.BlockPrefix, i+1)
			free = append(free, store.Op{Key: key + "02048", Value: []byte("{}")}, store.Op{Key: key, Still: 1})
		}
		units, err := memberDifference(view{}, "node-1", nil, nil, map[string]unit{"": free})
		if err != nil || len(units) != ips {
			t.Errorf("%d IPs: %d units, %v; want as many", ips, len(units), err)
		}
		for _, u := range units {
			if len(u) != 2 || u[1].Still == 0 {
				t.Errorf("%d IPs: a unit %v, want that of an IP with its guard", ips, u)
			}
		}
	}
}

// TestARecordThatCameAfterTheLookIsNotWrittenOver has a record change between the look at the cache and the comparison
// with it.
func TestARecordThatCameAfterTheLookIsNotWrittenOver(t *testing.T) {
	etcd := etcdtest.New(t)
	client, err := store.Dial(t.Context(), store.Config{Endpoints: []string{etcd.Endpoint()}})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	cache := client.NewCache("")
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	done := make(chan error, 1)
	go func() { done <- cache.Run(ctx) }()
	defer func() { cancel(); <-done }()
	put := func(value string) {
		t.Helper()
		if _, err := etcd.Client().Put(ctx, store.DefaultPrefix+"pools/p", value); err != nil {
			t.Fatal(err)
		}
		for r, _ := cache.Get("pools/p"); string(r.Value) != value; r, _ = cache.Get("pools/p") {
			select {
			case <-cache.Changed():
			case <-ctx.Done():
				t.Fatal("the cache does not follow")
			}
		}
	}
	put("1")
	then := view{cache, cache.Revision()}
	if _, ok, err := difference(then, "pools/p", 2); err != nil || !ok {
		t.Errorf("nothing came: got %t, %v", ok, err)
	}
	put("3")
	for _, value := range []any{2, nil} {
		if _, ok, err := difference(then, "pools/p", value); !errors.Is(err, store.ErrConflict) || ok {
			t.Errorf("writing %v over what came: got %t, %v, want a conflict", value, ok, err)
		}
	}
	if _, ok, err := difference(then, "pools/p", 3); ok || err != nil {
		t.Errorf("what came is what is wanted: got %t, %v", ok, err)
	}
}

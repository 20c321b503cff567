package agent

import (
	"testing"

	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/store"
)

// newEtcd returns a client of an etcd of the test's own. Both live in the namespace of the calling thread.
func newEtcd(t testing.TB) *store.Client {
	t.Helper()
	c, err := store.Dial(t.Context(), store.Config{Endpoints: []string{etcdtest.New(t).Endpoint()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

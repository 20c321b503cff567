package crdsync

import (
	"strings"
	"testing"

	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/store"
)

func TestAReplicaIsReadyWhenItCanTakeOver(t *testing.T) {
	client, err := store.Dial(t.Context(), store.Config{Endpoints: []string{etcdtest.New(t).Endpoint()}})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	r := &replica{Config: Config{Webhook: &Webhook{}}, cache: client.NewCache("")}
	lacks := func(what string) {
		t.Helper()
		if err := r.check(); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("the check says %v, want that %s is lacking", err, what)
		}
	}
	lacks("etcd")
	ended := make(chan error, 1)
	go func() { ended <- r.cache.Run(t.Context()) }()
	<-r.cache.Ready()
	lacks("the Kubernetes API")
	r.reached.Store(true)
	lacks("the webhook")
	r.webhook.Store(true)
	if err := r.check(); err != nil {
		t.Errorf("with all three: %v", err)
	}
	r.Webhook = nil
	r.webhook.Store(false)
	if err := r.check(); err != nil {
		t.Errorf("where it serves no webhook: %v", err)
	}
}

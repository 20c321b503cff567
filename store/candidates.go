package store

import (
	"context"
	"fmt"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// Others returns how many other replicas stand for election.
func (l *Leadership) Others(ctx context.Context) (int, error) {
	r, err := l.client.etcd.Get(ctx, l.client.key(l.of.prefix()), clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		return 0, fmt.Errorf("reading who stands for election: %w", err)
	}
	others := 0
	for _, kv := range r.Kvs {
		if string(kv.Key) != l.key {
			others++
		}
	}
	return others, nil
}

package credentials

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

const (
	caSecret     = "egret-etcd-ca"
	gossipSecret = "egret-gossip"
	// retry is how soon a pass that failed is tried again, and interval how often the Secrets are looked at: one that was deleted is back then.
	retry    = 5 * time.Second
	interval = time.Minute
)

// Names of etcd's users, the common names of the certificates.
const (
	Member   = "egret-etcd"
	Agent    = "egret-agent"
	Crdsync  = "egret-crdsync"
	Cloud    = "egret-cloud"
	Operator = "egret-operator"
	Root     = "root"
)

// OperatorSecret has the certificate by which etcd knows operators, and the CA of etcd's own.
const OperatorSecret = "egret-etcd-operator"

// Config is what Run needs.
type Config struct {
	Kube      kubernetes.Interface
	Namespace string
	// Service is the Service of etcd's members, Peers the headless one that names each of them.
	Service, Peers string
	Log            *slog.Logger
}

// ServerName is the name that a member of etcd proves to its clients, whatever address they dial.
func (c *Config) ServerName() string { return c.Service + "." + c.Namespace + ".svc" }

func (c *Config) subjects() []subject {
	peers := c.Peers + "." + c.Namespace + ".svc"
	return []subject{
		{secret: "egret-etcd-server", name: Member, dns: []string{c.ServerName(), "*." + peers, "localhost"}, ips: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}},
		{secret: "egret-etcd-agent", name: Agent},
		{secret: "egret-etcd-crdsync", name: Crdsync},
		{secret: "egret-etcd-cloud", name: Cloud},
		{secret: OperatorSecret, name: Operator},
		{secret: "egret-etcd-root", name: Root},
	}
}

// Run keeps the Secrets until ctx ends.
func Run(ctx context.Context, cfg Config) error {
	for said := ""; ; {
		wait := interval
		if err := Once(ctx, cfg, time.Now()); err != nil && ctx.Err() == nil {
			wait = retry
			if said != err.Error() {
				said = err.Error()
				cfg.Log.Error("cannot keep the secrets, will retry", "err", err)
			}
		} else {
			said = ""
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// Once makes what is missing or due. It goes on after an error, and can be run again, also by several at a time.
func Once(ctx context.Context, cfg Config, now time.Time) error {
	return cfg.pass(now, func(name string, kind corev1.SecretType, change change) error {
		return cfg.keep(ctx, name, kind, change)
	})
}

// change returns what the content of a Secret, nil where there is none, is to be, and whether that is something else.
type change func(have map[string][]byte) (map[string][]byte, bool, error)

func (c *Config) pass(now time.Time, keep func(name string, kind corev1.SecretType, change change) error) error {
	errs := []error{keep(gossipSecret, corev1.SecretTypeOpaque, func(have map[string][]byte) (map[string][]byte, bool, error) {
		if have != nil {
			return have, false, nil
		}
		key := make([]byte, 32)
		_, _ = rand.Read(key) // never fails
		return map[string][]byte{"key": []byte(base64.StdEncoding.EncodeToString(key))}, true, nil
	})}
	var a authority
	err := keep(caSecret, corev1.SecretTypeTLS, func(have map[string][]byte) (map[string][]byte, bool, error) {
		a = authority{}
		var err error
		if have != nil {
			if a, err = readAuthority(have); err != nil {
				return nil, false, fmt.Errorf("reading the CA: %w: what it signed is in use; to begin with a new one, delete it", err)
			}
		}
		changed, err := a.advance(now)
		if err != nil || !changed {
			return have, false, err
		}
		data, err := a.data()
		return data, true, err
	})
	if err != nil {
		return errors.Join(append(errs, err)...) // without a CA nothing is signed
	}
	for _, s := range c.subjects() {
		errs = append(errs, keep(s.secret, corev1.SecretTypeTLS, func(have map[string][]byte) (map[string][]byte, bool, error) {
			return a.issue(s, have, now)
		}))
	}
	return errors.Join(errs...)
}

// keep reads a Secret and writes what change makes of it, nil where there is none. Of several writers one wins, and the others look again.
func (c *Config) keep(ctx context.Context, name string, kind corev1.SecretType, change change) error {
	secrets := c.Kube.CoreV1().Secrets(c.Namespace)
	for {
		s, err := secrets.Get(ctx, name, metav1.GetOptions{})
		missing := apierrors.IsNotFound(err)
		if err != nil && !missing {
			return fmt.Errorf("reading Secret %s/%s: %w", c.Namespace, name, err)
		}
		var have map[string][]byte
		if !missing {
			have = map[string][]byte{}
			maps.Copy(have, s.Data)
		}
		data, changed, err := change(have)
		if err != nil {
			return fmt.Errorf("keeping Secret %s/%s: %w", c.Namespace, name, err)
		}
		if !changed {
			return nil
		}
		if missing {
			s = &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}, Type: kind, Data: data}
			_, err = secrets.Create(ctx, s, metav1.CreateOptions{})
		} else {
			s.Data = data
			_, err = secrets.Update(ctx, s, metav1.UpdateOptions{})
		}
		switch {
		case err == nil:
			c.Log.Info("wrote a secret", "secret", name)
			return nil
		case !apierrors.IsAlreadyExists(err) && !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) || ctx.Err() != nil:
			return fmt.Errorf("writing Secret %s/%s: %w", c.Namespace, name, err)
		}
		if missing && apierrors.IsNotFound(err) {
			return fmt.Errorf("writing Secret %s/%s: %w", c.Namespace, name, err) // there is no such namespace
		}
	}
}

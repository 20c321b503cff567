package manifests_test

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/egret-project/egret/internal/kubetest"
	"github.com/egret-project/egret/manifests"
)

const (
	crdsyncAccount     = "system:serviceaccount:" + system + ":egret-crdsync"
	credentialsAccount = "system:serviceaccount:" + system + ":egret-credentials"
)

// A role that lets create Secrets has no effect without the policy's leave for each of them.
func TestThePolicyOfSecretsAndTheRolesNameTheSame(t *testing.T) {
	t.Parallel()
	for _, variant := range []string{"as it comes", "bare", "bundled etcd", "metrics", "metrics, and a page on loopback", "all said"} {
		roles, policy := map[string][]string{}, map[string][]string{}
		for _, o := range manifests.ObjectsOf(t, variant) {
			switch o := o.(type) {
			case *rbacv1.Role:
				if slices.Contains(o.Rules[0].Verbs, "create") {
					roles["system:serviceaccount:"+system+":"+o.Name] = o.Rules[1].ResourceNames
				}
			case *admissionregistrationv1.ValidatingAdmissionPolicy:
				if o.Name != "egret-secrets" {
					continue
				}
				names := strings.TrimSuffix(o.Spec.Variables[0].Expression, "[request.userInfo.username]")
				if err := json.Unmarshal([]byte(names), &policy); err != nil {
					t.Fatal(err)
				}
			}
		}
		if d := cmp.Diff(roles, policy); d != "" {
			t.Errorf("%s: Secrets by who makes them (-role +policy):\n%s", variant, d)
		}
	}
}

// A Secret of the type of tokens is soon filled with the token of the account that it names, and who has created it may
// read it: so whoever breaks into crdsync would have the CA of etcd, and who breaks into credentials what crdsync may
// do.
func TestNobodyMakesASecretThatGetsTheTokenOfAnotherAccount(t *testing.T) {
	t.Parallel()
	s := tenants{t, kubetest.New(t)}
	admin, err := kubernetes.NewForConfig(s.cfg)
	if err != nil {
		t.Fatal(err)
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: system}}
	if _, err := admin.CoreV1().Namespaces().Create(t.Context(), ns, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, o := range manifests.ObjectsOf(t, "bundled etcd") {
		switch o.(type) {
		case *rbacv1.Role, *rbacv1.RoleBinding, *admissionregistrationv1.ValidatingAdmissionPolicy, *admissionregistrationv1.ValidatingAdmissionPolicyBinding:
			b, err := yaml.Marshal(o)
			if err != nil {
				t.Fatal(err)
			}
			s.apply(b)
		}
	}
	create := func(account string, secret corev1.Secret) error {
		t.Helper()
		cfg := rest.CopyConfig(s.cfg)
		cfg.Impersonate.UserName = account
		kube, err := kubernetes.NewForConfig(cfg)
		if err != nil {
			t.Fatal(err)
		}
		_, err = kube.CoreV1().Secrets(system).Create(t.Context(), &secret, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		return err
	}
	opaque := func(name string) corev1.Secret { return corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}} }
	certificate := func(name string) corev1.Secret {
		s := opaque(name)
		s.Type, s.Data = corev1.SecretTypeTLS, map[string][]byte{corev1.TLSCertKey: []byte("c"), corev1.TLSPrivateKeyKey: []byte("k")}
		return s
	}
	token := func(name, of string) corev1.Secret {
		s := opaque(name)
		s.Type, s.Annotations = corev1.SecretTypeServiceAccountToken, map[string]string{corev1.ServiceAccountNameKey: of}
		return s
	}
	registry := opaque("egret-webhook-ca")
	registry.Type, registry.Data = corev1.SecretTypeDockercfg, map[string][]byte{corev1.DockerConfigKey: []byte("{}")}
	for end := time.Now().Add(time.Minute); create(crdsyncAccount, opaque("any")) == nil; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the policy does not work") // the server hears of it by a watch of its own
		}
	}
	for what, try := range map[string]struct {
		account string
		secret  corev1.Secret
		allowed bool
	}{
		"the CA of the webhook":             {crdsyncAccount, certificate("egret-webhook-ca"), true},
		"the CA of etcd":                    {credentialsAccount, certificate("egret-etcd-ca"), true},
		"the key of the gossip":             {credentialsAccount, opaque("egret-gossip"), true},
		"the token of credentials":          {crdsyncAccount, token("egret-webhook-ca", "egret-credentials"), false},
		"the token of crdsync":              {credentialsAccount, token("egret-gossip", "egret-crdsync"), false},
		"a token by another name":           {crdsyncAccount, token("any", "egret-credentials"), false},
		"the CA of etcd, by crdsync":        {crdsyncAccount, certificate("egret-etcd-ca"), false},
		"the CA of the webhook, by another": {credentialsAccount, certificate("egret-webhook-ca"), false},
		"a name that the server makes":      {crdsyncAccount, corev1.Secret{ObjectMeta: metav1.ObjectMeta{GenerateName: "egret-webhook-ca"}}, false},
		"what is of a registry":             {crdsyncAccount, registry, false},
		"a token, by an administrator":      {"", token("any", "egret-credentials"), true},
	} {
		err := create(try.account, try.secret)
		switch {
		case try.allowed && err != nil:
			t.Errorf("%s: %v, want it allowed", what, err)
		case !try.allowed && !apierrors.IsForbidden(err) && !apierrors.IsInvalid(err):
			t.Errorf("%s: %v, want it refused", what, err)
		case !try.allowed && !strings.Contains(err.Error(), "make their own Secrets alone"):
			t.Errorf("%s: it is not the policy that refuses: %v", what, err)
		}
	}
}

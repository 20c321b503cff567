package crdsync

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	authn "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/egret-project/egret/internal/kubetest"
)

func TestATokenMayLookWhereItsUserHasTheRight(t *testing.T) {
	cfg := kubetest.New(t)
	static := cfg.BearerToken // of --token-auth-file: it is cluster-admin's
	kube, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	const audience, url = "egret-page", "/egret/page"
	for _, name := range []string{"ann", "bob"} {
		ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "ns-" + name}}
		if _, err := kube.CoreV1().Namespaces().Create(t.Context(), ns, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}
		if _, err := kube.CoreV1().ServiceAccounts("ns-"+name).Create(t.Context(), account, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	token := func(name string, audiences ...string) string {
		t.Helper()
		r, err := kube.CoreV1().ServiceAccounts("ns-"+name).CreateToken(t.Context(), name, &authn.TokenRequest{Spec: authn.TokenRequestSpec{Audiences: audiences}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return r.Status.Token
	}
	role := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "page"}, Rules: []rbacv1.PolicyRule{{NonResourceURLs: []string{url}, Verbs: []string{"get"}}}}
	if _, err := kube.RbacV1().ClusterRoles().Create(t.Context(), role, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	binding := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "page"}, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "page"},
		Subjects: []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Name: "ann", Namespace: "ns-ann"}},
	}
	if _, err := kube.RbacV1().ClusterRoleBindings().Create(t.Context(), binding, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	ann, bob := token("ann", audience), token("bob", audience)
	may := MayGet(kube, audience, url)
	// the API server learns of a binding by a watch of its own
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if ok, err := may(t.Context(), ann); ok && err == nil {
			break
		} else if time.Now().After(end) {
			t.Fatalf("who has the right: %v, %v; want yes", ok, err)
		}
	}
	for name, token := range map[string]string{
		"another user": bob, "nobody": "nonsense", "a token with another signature": ann[:len(ann)-8] + "AAAAAAAA",
		"a token for the API server":     token("ann"),
		"a token for something else":     token("ann", "vault"),
		"a token that no audience is in": static,
	} {
		if ok, err := may(t.Context(), token); ok || err != nil {
			t.Errorf("%s: %v, %v; want no", name, ok, err)
		}
	}
}

// An attempt: where whatever authenticates leaves audiences out of account, a pod's token would be as good as the
// page's.
func TestATokenIsNoneWhereAudiencesAreNotKnown(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasSuffix(r.URL.Path, "/tokenreviews") {
			t.Errorf("the API server is asked %s of who has shown no token", r.URL.Path)
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, `{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
			"status": {"authenticated": true, "user": {"username": "ann"}}}`) // who asked has gone
	}))
	t.Cleanup(server.Close)
	kube, err := kubernetes.NewForConfig(&rest.Config{Host: server.URL})
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := MayGet(kube, "egret-page", "/egret/page")(t.Context(), "token"); ok || err != nil {
		t.Errorf("%v, %v; want no", ok, err)
	}
}

// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// erinsRights are erin's rights to impersonate. Names that start with "old" are
// covered by the verb impersonate, names that start with "new" by constrained
// impersonation, and only for some requests.
const erinsRights = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: e2e-act-as}
rules:
- {apiGroups: [""], verbs: [impersonate], resources: [users], resourceNames: [old-user, "system:node:old-node", "system:anonymous", "system:kube-scheduler", "old:user with blanks"]}
- {apiGroups: [""], verbs: [impersonate], resources: [groups], resourceNames: [old-group, other-old-group, acted-group, "system:masters", "system:authenticated", "system:unauthenticated"]}
- {apiGroups: [authentication.k8s.io], verbs: [impersonate], resources: [uids], resourceNames: [old-uid]}
- {apiGroups: [authentication.k8s.io], verbs: [impersonate], resources: [userextras/scopes, userextras/example.com/role], resourceNames: [old-value, other-old-value]}
- {apiGroups: [authentication.k8s.io], verbs: ["impersonate:user-info"], resources: [users], resourceNames: [new-user]}
- {apiGroups: [authentication.k8s.io], verbs: ["impersonate:user-info"], resources: [groups], resourceNames: [new-group, "system:masters"]}
- {apiGroups: [authentication.k8s.io], verbs: ["impersonate:user-info"], resources: [uids], resourceNames: [new-uid]}
- {apiGroups: [authentication.k8s.io], verbs: ["impersonate:user-info"], resources: [userextras/example.com/role, userextras/scopes], resourceNames: [new-value]}
- {apiGroups: [authentication.k8s.io], verbs: ["impersonate:arbitrary-node"], resources: [nodes], resourceNames: [new-node]}
- {apiGroups: [authentication.k8s.io], verbs: ["impersonate-on:user-info:create", "impersonate-on:arbitrary-node:create", "impersonate-on:serviceaccount:create"], resources: [selfsubjectreviews]}
- {apiGroups: [""], verbs: ["impersonate-on:user-info:list"], resources: [pods]}
- {nonResourceURLs: [/version], verbs: ["impersonate-on:user-info:get"]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: e2e-act-as}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: e2e-act-as}
subjects:
- {apiGroup: rbac.authorization.k8s.io, kind: User, name: erin@example.com}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: e2e-act-as, namespace: default}
rules:
- {apiGroups: [""], verbs: [impersonate], resources: [serviceaccounts], resourceNames: [old-account]}
- {apiGroups: [authentication.k8s.io], verbs: ["impersonate:serviceaccount"], resources: [serviceaccounts], resourceNames: [new-account]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: e2e-act-as, namespace: default}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: e2e-act-as}
subjects:
- {apiGroup: rbac.authorization.k8s.io, kind: User, name: erin@example.com}
---
# A right granted to a group, and one with wildcards.
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: e2e-act-as-by-group}
rules:
- {apiGroups: [""], verbs: [impersonate], resources: [users], resourceNames: [for-group-a]}
- {apiGroups: [authentication.k8s.io], verbs: ["impersonate:user-info"], resources: [groups, "userextras/*"], resourceNames: ["*"]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: e2e-act-as-by-group}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: e2e-act-as-by-group}
subjects:
- {apiGroup: rbac.authorization.k8s.io, kind: Group, name: a}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: e2e-act-as-authenticated}
rules:
- {apiGroups: [""], verbs: [impersonate], resources: [users], resourceNames: [for-everybody]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: e2e-act-as-authenticated}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: e2e-act-as-authenticated}
subjects:
- {apiGroup: rbac.authorization.k8s.io, kind: Group, name: system:authenticated}
`

// proxysRights are what the proxy's account needs besides what 12-act-as.yaml gives it:
// the groups, UIDs and extra fields that erin asks for, by name.
const proxysRights = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: e2e-act-as-proxy}
rules:
- {apiGroups: [""], verbs: [impersonate], resources: [groups], resourceNames: [old-group, other-old-group, acted-group, new-group, g1, g2, g3, g4, "system:masters", "system:authenticated", "system:unauthenticated", "system:nodes"]}
- {apiGroups: [authentication.k8s.io], verbs: [impersonate], resources: [uids, userextras/scopes, userextras/example.com/role, userextras/example.com/other]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: e2e-act-as-proxy}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: e2e-act-as-proxy}
subjects:
- {kind: ServiceAccount, name: proxy, namespace: tailscale-impersonate}
`

// erinDirectly returns a configuration with which erin calls the API server directly, with a certificate.
func erinDirectly(t *testing.T) *rest.Config {
	t.Helper()
	config, err := theLab.Cluster.As("erin@example.com", "b", "a", "c")
	if err != nil {
		t.Fatal(err)
	}
	return config
}

// giveErinRights gives erin her rights, and waits until they are in force.
func giveErinRights(t *testing.T) {
	t.Helper()
	useOlderVerb(t)
	if err := theLab.Cluster.Apply(t.Context(), []byte(erinsRights)); err != nil {
		t.Fatal(err)
	}
	direct := erinDirectly(t)
	eventually(t, "the rights are in force", func() error {
		for _, user := range []string{"for-everybody", "for-group-a", "old-user", "new-user", "system:node:new-node", "system:serviceaccount:default:new-account", "system:serviceaccount:default:old-account"} {
			if o, err := do(t.Context(), direct, rest.ImpersonationConfig{UserName: user}, selfReview); err != nil || o.Refused != "" {
				return fmt.Errorf("as %s: %w %s", user, err, o.Refused)
			}
		}
		return nil
	})
}

// giveProxyRights gives the proxy's account more rights than 12-act-as.yaml, and waits
// until they are in force.
func giveProxyRights(t *testing.T) {
	t.Helper()
	if err := theLab.Cluster.Apply(t.Context(), []byte(proxysRights)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // the other tests need a proxy without unnecessary rights
		if _, stderr, err := runKubectl(t, theLab.AdminKubeconfig(), nil, "delete", "clusterrolebinding", "e2e-act-as-proxy", "--ignore-not-found"); err != nil {
			t.Errorf("removing the proxy's rights: %v: %s", err, stderr)
		}
	})
	eventually(t, "the proxy's rights are in force", func() error {
		stdout, stderr, err := runKubectl(t, theLab.AdminKubeconfig(), nil, "auth", "can-i", "impersonate", "groups/old-group", "--as", "system:serviceaccount:tailscale-impersonate:proxy")
		if err != nil {
			return fmt.Errorf("%w: %s%s", err, stdout, stderr)
		}
		return nil
	})
}

// The requests of the table.
const (
	selfReview = "who am I"
	pods       = "list pods"
	secrets    = "list secrets"
	version    = "get /version"
)

// dotless encodes dots in header names.
type dotless struct{ http.RoundTripper }

func (d dotless) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	for name, values := range r.Header {
		if strings.Contains(name, ".") {
			delete(r.Header, name)
			r.Header[strings.ReplaceAll(name, ".", "%2e")] = values
		}
	}
	return d.RoundTripper.RoundTrip(r)
}

// outcome is the result of a request.
type outcome struct {
	Who     authenticationv1.UserInfo // of selfReview
	Refused string                    // the refusal's message
	Code    int32
}

// do makes a request.
func do(ctx context.Context, config *rest.Config, as rest.ImpersonationConfig, request string) (outcome, error) {
	config = rest.CopyConfig(config)
	config.Impersonate = as
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return outcome{}, err
	}
	var o outcome
	switch request {
	case selfReview:
		var review *authenticationv1.SelfSubjectReview
		if review, err = client.AuthenticationV1().SelfSubjectReviews().Create(ctx, &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{}); err == nil {
			o.Who = review.Status.UserInfo
		}
	case pods:
		_, err = client.CoreV1().Pods("default").List(ctx, metav1.ListOptions{})
	case secrets:
		_, err = client.CoreV1().Secrets("default").List(ctx, metav1.ListOptions{})
	case version:
		err = client.RESTClient().Get().AbsPath("/version").Do(ctx).Error()
	default:
		return outcome{}, fmt.Errorf("unknown request %q", request)
	}
	var status *apierrors.StatusError
	if errors.As(err, &status) {
		o.Refused, o.Code = status.ErrStatus.Message, status.ErrStatus.Code
		return o, nil
	}
	return o, err
}

// row is a request of erin's as another user, and whether she may make it.
type row struct {
	as      rest.ImpersonationConfig
	request string
	may     bool
}

// needs returns 1 if the proxy's account needs more rights for the row than those of
// 12-act-as.yaml, and 0 otherwise.
func (r row) needs() int {
	if len(r.as.Groups) > 0 || r.as.UID != "" || len(r.as.Extra) > 0 || r.as.UserName == "system:node:new-node" {
		return 1
	}
	return 0
}

// A request of erin's has the same outcome over the tailnet as directly at the API
// server, with a certificate. The proxy's account has the rights of 12-act-as.yaml, and
// those to groups, UIDs and extra fields only while they are asked for.
func TestActAs_DecidesLikeAPIServer(t *testing.T) {
	giveErinRights(t)
	direct := erinDirectly(t)
	proxied, err := theLab.Callers["erin"].REST()
	if err != nil {
		t.Fatal(err)
	}
	proxied.Host, proxied.TLSClientConfig, proxied.QPS = "http://"+lab.ProxyName+":"+portAuthorize, rest.TLSClientConfig{}, -1

	// Caddy drops headers with dots in their names. The API server decodes them, so
	// encoded ones mean the same.
	proxied.WrapTransport = func(rt http.RoundTripper) http.RoundTripper { return dotless{rt} }

	as := func(user string, groups ...string) rest.ImpersonationConfig {
		return rest.ImpersonationConfig{UserName: user, Groups: groups}
	}
	uid := func(c rest.ImpersonationConfig, uid string) rest.ImpersonationConfig { c.UID = uid; return c }
	extra := func(c rest.ImpersonationConfig, key string, values ...string) rest.ImpersonationConfig {
		c.Extra = maps.Clone(c.Extra)
		if c.Extra == nil {
			c.Extra = make(map[string][]string)
		}
		c.Extra[key] = values
		return c
	}
	const account = "system:serviceaccount:default:"
	rows := []row{
		// The verb impersonate.
		{as("old-user"), selfReview, true},
		{as("old-user"), pods, true},
		{as("old-user"), secrets, true},
		{as("old-user"), version, true},
		{as("nobody"), selfReview, false},
		{as("nobody"), pods, false},
		{as("nobody"), version, false},
		{as("old:user with blanks"), selfReview, true},
		{as("Old-User"), selfReview, false},
		{as("for-group-a"), selfReview, true},
		{as("for-everybody"), selfReview, true},
		{as("old-user", "old-group"), selfReview, true},
		{as("old-user", "old-group", "other-old-group"), selfReview, true},
		{as("old-user", "old-group", "nobodys"), selfReview, false},
		{as("old-user", "nobodys"), selfReview, false},
		{as("nobody", "old-group"), selfReview, false},
		{as("old-user", "system:masters"), secrets, true},
		{as("old-user", "system:authenticated"), selfReview, true},
		{as("old-user", "system:unauthenticated"), selfReview, true},
		{as("old-user", "a"), selfReview, false},
		{uid(as("old-user"), "old-uid"), selfReview, true},
		{uid(as("old-user"), "nobodys"), selfReview, false},
		{uid(as("nobody"), "old-uid"), selfReview, false},
		{extra(as("old-user"), "scopes", "old-value"), selfReview, true},
		{extra(as("old-user"), "scopes", "old-value", "other-old-value"), selfReview, true},
		{extra(as("old-user"), "scopes", "old-value", "nobodys"), selfReview, false},
		{extra(as("old-user"), "example.com/role", "old-value"), selfReview, true},
		{extra(as("old-user"), "example.com/other", "old-value"), selfReview, false},
		{extra(extra(uid(as("old-user", "old-group"), "old-uid"), "scopes", "old-value"), "example.com/role", "other-old-value"), selfReview, true},
		{extra(extra(uid(as("old-user", "old-group"), "old-uid"), "scopes", "old-value"), "example.com/role", "nobodys"), selfReview, false},
		{as(account + "old-account"), selfReview, true},
		{as(account + "old-account"), pods, true},
		{as(account + "nobodys"), selfReview, false},
		{as("system:serviceaccount:kube-system:old-account"), selfReview, false},
		{as(account+"old-account", "old-group"), selfReview, true},
		{as(account+"old-account", "nobodys"), selfReview, false},
		{uid(as(account+"old-account"), "old-uid"), selfReview, true},
		{as("system:serviceaccount:default"), selfReview, false}, // not a valid service account
		{as("system:node:old-node"), selfReview, true},
		{as("system:node:nobodys"), selfReview, false},
		{as("system:node:old-node", "old-group"), selfReview, true},
		{as("system:anonymous"), selfReview, true},
		{as("system:kube-scheduler"), selfReview, true},
		{as("system:kube-controller-manager"), selfReview, false},

		// Constrained impersonation, which also depends on the request.
		{as("new-user"), selfReview, true},
		{as("new-user"), pods, true},
		{as("new-user"), secrets, false},
		{as("new-user"), version, true},
		{as("new-user", "new-group"), selfReview, true},
		{as("new-user", "new-group"), secrets, false},
		{as("new-user", "nobodys"), selfReview, false},
		{as("new-user", "system:masters"), selfReview, false},
		{as("new-user", "g1", "g2", "g3"), selfReview, false},
		{as("new-user", "g1", "g2", "g3", "g4"), selfReview, true}, // for four or more, "*" suffices
		{as("new-user", "g1", "g2", "g3", "system:masters"), selfReview, false},
		{uid(as("new-user"), "new-uid"), selfReview, true},
		{uid(as("new-user"), "old-uid"), selfReview, false},
		{extra(as("new-user"), "example.com/role", "new-value"), selfReview, true},
		{extra(as("new-user"), "example.com/role", "old-value"), selfReview, false},
		{extra(as("new-user"), "scopes", "new-value"), selfReview, false}, // a key without a domain
		{extra(as("new-user"), "example.com/role", "v1", "v2", "v3", "v4"), selfReview, true},
		{as(account + "new-account"), selfReview, true},
		{as(account + "new-account"), pods, false},
		{as(account+"new-account", "new-group"), selfReview, false},
		{as("system:node:new-node"), selfReview, true},
		{as("system:node:new-node"), pods, false},
		{uid(as("system:node:new-node"), "new-uid"), selfReview, false},

		// Half of a right by each form is not a right.
		{as("old-user", "new-group"), selfReview, false},
		{as("new-user", "old-group"), selfReview, false},
		{uid(as("old-user"), "new-uid"), selfReview, false},
	}
	if len(rows) < 40 {
		t.Fatalf("the table has %d rows; want at least 40", len(rows))
	}
	shipped := true
	// Rows for which the rights of 12-act-as.yaml have to suffice go first.
	slices.SortStableFunc(rows, func(a, b row) int { return a.needs() - b.needs() })
	for _, row := range rows {
		if shipped && row.needs() > 0 {
			giveProxyRights(t)
			shipped = false
		}
		name := fmt.Sprintf("%s as %s", row.request, row.as.UserName)
		if len(row.as.Groups) > 0 {
			name += fmt.Sprintf(" in %q", row.as.Groups)
		}
		if row.as.UID != "" {
			name += " with UID " + row.as.UID
		}
		for key, values := range row.as.Extra {
			name += fmt.Sprintf(" with %s=%q", key, values)
		}
		t.Run(name, func(t *testing.T) {
			want, err := do(t.Context(), direct, row.as, row.request)
			if err != nil {
				t.Fatal(err)
			}
			got, err := do(t.Context(), proxied, row.as, row.request)
			if err != nil {
				t.Fatal(err)
			}
			refused := strings.Contains(want.Refused, `User "erin@example.com" cannot impersonate`)
			if refused == row.may {
				t.Errorf("the API server answers erin directly with %q; want it to let her through: %t", want.Refused, row.may)
			}
			if refused {
				if got.Code != want.Code || !strings.HasPrefix(got.Refused, "tailscale_impersonate: ") || !strings.Contains(got.Refused, want.Refused) {
					t.Errorf("the proxy answers %d %q; want the API server's refusal: %d %q", got.Code, got.Refused, want.Code, want.Refused)
				}
				return
			}
			if row.request == selfReview && got.Refused == "" {
				if got.Who.Extra[impersonate.ExtraOriginalUser] == nil {
					t.Errorf("the extra fields are %v; want them to name erin", got.Who.Extra)
				}
				for _, key := range impersonate.OriginalExtras {
					delete(got.Who.Extra, key)
				}
				if len(got.Who.Extra) == 0 && len(want.Who.Extra) == 0 {
					got.Who.Extra = want.Who.Extra // nil or empty
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("different outcome through the proxy (-direct +proxied):\n%s", diff)
			}
		})
	}
}

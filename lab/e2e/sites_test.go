// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/tailscale/hujson"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	sessionrecorder "github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/recorder"
)

// Ports of the sites on the proxy's node, in addition to 443 and 80.
const (
	portHTTPTransport    = "8001" // plain HTTP, transport http to the plain recorder
	portHTTPTransportTLS = "8441" // the same over TLS, which offers HTTP/2
	portRecorded         = "8002" // plain HTTP, transport kubernetes to the TLS recorder
	portRecordedTLS      = "8442" // the same over TLS, which offers HTTP/2
	portUnprotected      = "8003" // transport kubernetes without the handler
	portMeddling         = "8004" // transport kubernetes, with header_up against it
	portStrip            = "8005" // client_impersonation strip
	portProxyProtocol    = "8006" // behind a PROXY protocol listener wrapper
	portTwoNodes         = "8007" // on two nodes
	portSameAddress      = "8008" // on three nodes of two tailnets, two of them with the same address
	portOrigins          = "8009" // allow_origins and allow_hosts
	portUI               = "8444" // allow_origins with its own and other origins, over TLS
	portHTTP3            = "8443" // TLS with HTTP/3
	portGroupLimits      = "8012" // limits on groups, and prefixes
	portDeviceLimits     = "8013" // limits on devices
	portReadOnly         = "8014" // as examples/read-only.caddyfile
	portNoShells         = "8015" // as examples/no-shells-for-devices.caddyfile
	portRewriting        = "8016" // rewrites requests after a matcher
	portFiles            = "8017" // records sessions to recordings(lab)
	portInput            = "8061" // the same, with what is typed
	portAudit            = "8021" // audit
	portAuthorize        = "8022" // client_impersonation authorize
	portAuthorizeLimits  = "8023" // the same with audit, deny_groups and allow_groups
	portAuthorizeHTTP    = "8024" // the same with transport http, to the plain recorder
	portNarrow           = "8018" // deny_groups, whoami, over TLS
	portBelowPath        = "8027" // below /cluster-a, with whoami
	portLocalhost        = "8026" // TLS, with the name localhost
	portDeviceUsers      = "8031" // users of tagged devices by ID, with a prefix, and whoami
	portChoice           = "8051" // optional_groups and record_groups
	portChoiceAuthorize  = "8052" // optional_groups, and client_impersonation authorize
	portChoiceLimits     = "8053" // optional_groups with limits, prefixes, audit and whoami
	portAgents           = "8054" // as examples/agents.caddyfile
	portSecondNode       = "8071" // on the second node: require_groups, whoami, over TLS
	portForeignNode      = "8072" // on the node of the other tailnet: whoami
	portNoAuth           = "8011" // credentials client, with the administrator's kubeconfig
)

// portMixed is the port of the site that listens both on the tailnet and on
// loopback, so it also has to be free on the host.
var portMixed = freePort()

const (
	secondNode  = "k8s-second"
	foreignNode = "foreign"
)

// sites returns the Caddyfile of the lab's Caddy.
func sites(l *lab.Lab) string {
	globals := l.Globals(l.ProxyKey(), "servers tailscale/"+lab.ProxyName+":"+portAuthorize+` {
	protocols h1
	expected_dot_headers impersonate-extra-example.com*
}`, "servers tailscale/"+lab.ProxyName+":"+portProxyProtocol+` {
	protocols h1
	listener_wrappers {
		proxy_protocol {
			allow 100.64.0.0/10
		}
	}
}`, "servers tailscale/"+lab.ProxyName+":"+portHTTP3+` {
	protocols h1 h2 h3
}`)
	nodes := fmt.Sprintf(`
	tailscale {
		%s {
			auth_key %s
		}
		%s {
			auth_key %s
			control_url %s
		}
`, secondNode, secondKey(l), foreignNode, other.key, other.headscale.URL())
	globals = replaceOnce(globals, "\ttailscale {\n", nodes)

	toCluster := fmt.Sprintf(`
	reverse_proxy %s {
		transport kubernetes {
			kubeconfig %s
		}
		flush_interval -1
		stream_close_delay 1m
	}
`, l.Cluster.Host(), l.Kubeconfig())
	toPlain := "\treverse_proxy " + plain.addr + "\n"
	toRecorder := func(options string) string {
		return fmt.Sprintf(`
	reverse_proxy https://%s {
		transport kubernetes {
			kubeconfig %s
		}
		%s
	}
`, encrypted.addr, filepath.Join(l.Dir, "recorder.kubeconfig"), options)
	}
	site := func(address, bind, body string) string {
		return fmt.Sprintf("%s {\n\tbind %s\n\tlog\n%s}\n", address, bind, body)
	}
	const (
		k8s  = "tailscale/" + lab.ProxyName
		name = lab.ProxyName + "." + lab.Domain
	)
	impersonate := "\ttailscale_impersonate\n"
	return globals +
		site("https://"+name, k8s, "\ttls internal\n\ttailscale_kubernetes {\n\t\tkubeconfig "+l.Kubeconfig()+"\n\t\tstream_close_delay 1m\n\t\twhoami\n\t}\n") +
		site("http://:"+portNoAuth, k8s, fmt.Sprintf("\treverse_proxy {\n\t\tdynamic kubernetes {\n\t\t\tkubeconfig %[1]s\n\t\t}\n\t\ttransport kubernetes {\n\t\t\tkubeconfig %[1]s\n\t\t\tcredentials client\n\t\t}\n\t}\n", l.AdminKubeconfig())) +
		site("http://", k8s, impersonate+toCluster) +
		site("http://:"+portHTTPTransport, k8s, impersonate+toPlain) +
		site("https://"+name+":"+portHTTPTransportTLS, k8s, "\ttls internal\n"+impersonate+toPlain) +
		site("https://"+name+":"+portHTTP3, k8s, "\ttls internal\n"+impersonate+toPlain) +
		site("http://:"+portRecorded, k8s, impersonate+toRecorder("")) +
		site("https://"+name+":"+portRecordedTLS, k8s, "\ttls internal\n"+impersonate+toRecorder("")) +
		site("http://:"+portUnprotected, k8s, toRecorder("")) +
		site("http://:"+portMeddling, k8s, impersonate+toRecorder("header_up -Impersonate-*\n\t\theader_up Impersonate-User system:admin\n\t\theader_up Authorization \"Bearer other\"")) +
		site("http://:"+portStrip, k8s, "\ttailscale_impersonate {\n\t\tclient_impersonation strip\n\t}\n"+toCluster) +
		site("http://:"+portGroupLimits, k8s, "\ttailscale_impersonate {\n\t\tallow_groups a b tailnet-admins system:*\n\t\tdeny_groups "+masters()+" b\n\t\tuser_prefix tailnet:\n\t\tgroup_prefix tailnet:\n\t}\n"+toCluster) +
		site("http://:"+portDeviceLimits, k8s, "\ttailscale_impersonate {\n\t\twhoami\n\t\trequire_groups\n\t\tallow_tags tag:k8s-*\n\t\tdeny_tags tag:k8s-ops\n\t\tdeny_shared\n\t}\n"+toCluster) +
		site("http://:"+portDeviceUsers, k8s, "\ttailscale_impersonate {\n\t\twhoami\n\t\ttagged_user id\n\t\tdevice_user_prefix device:\n\t}\n"+toCluster) +
		site("http://:"+portReadOnly, k8s, exampleRules("read-only")+toCluster) +
		site("http://:"+portNoShells, k8s, exampleRules("no-shells-for-devices")+toCluster) +
		site("http://:"+portRewriting, k8s, impersonate+"\t@writes not kubernetes {\n\t\tverb get list watch\n\t}\n\trespond @writes 403\n"+
			replaceOnce(toCluster, "\t\tflush_interval -1\n", "\t\tmethod DELETE\n\t\trewrite /api/v1/namespaces/default/configmaps/rewritten\n")) +
		site("http://:"+portFiles, k8s, "\ttailscale_impersonate {\n\t\trecord "+recordings(l)+"\n\t}\n"+toCluster) +
		site("http://:"+portInput, k8s, "\ttailscale_impersonate {\n\t\trecord "+recordings(l)+"\n\t\trecord_input all\n\t}\n"+toCluster) +
		site("http://:"+portAudit, k8s, "\ttailscale_impersonate {\n\t\taudit\n\t}\n"+toCluster) +
		site("http://:"+portAuthorize, k8s, "\ttailscale_impersonate {\n\t\tclient_impersonation authorize\n\t}\n"+toCluster) +
		site("http://:"+portAuthorizeLimits, k8s, "\ttailscale_impersonate {\n\t\tclient_impersonation authorize\n\t\taudit\n\t\tallow_groups acted-* tailnet-* system:*\n\t\tdeny_groups system:masters system:serviceaccounts system:nodes\n\t}\n"+toCluster) +
		"&(plain) {\n" + toPlain + "}\n" +
		site("http://:"+portAuthorizeHTTP, k8s, "\ttailscale_impersonate {\n\t\tclient_impersonation authorize\n\t}\n\tinvoke plain\n") +
		site("http://"+lab.ProxyName+":"+portBelowPath, k8s, "\thandle_path /cluster-a/* {\n\ttailscale_kubernetes {\n\t\tkubeconfig "+l.Kubeconfig()+"\n\t\twhoami\n\t}\n\t}\n") +
		site("https://localhost:"+portLocalhost, k8s, "\ttls internal\n\ttailscale_impersonate {\n\t\twhoami\n\t}\n"+toCluster) +
		site("https://"+name+":"+portNarrow, k8s, "\ttls internal\n\ttailscale_impersonate {\n\t\twhoami\n\t\trequire_groups\n\t\tdeny_groups system:* tailnet-admins\n\t}\n"+toCluster) +
		site("http://:"+portProxyProtocol, k8s, impersonate+toPlain) +
		site("http://:"+portTwoNodes, k8s+" tailscale/"+secondNode, impersonate+toPlain) +
		site("http://:"+portSameAddress, k8s+" tailscale/"+secondNode+" tailscale/"+foreignNode, impersonate+toPlain) +
		site("http://:"+portOrigins, k8s, "\ttailscale_impersonate {\n\t\tallow_origins https://dashboard.example.com\n\t\tallow_hosts k8s.internal.example\n\t}\n"+toCluster) +
		site("https://"+name+":"+portUI, k8s, "\ttls internal\n\ttailscale_impersonate {\n\t\tallow_origins https://"+name+":"+portUI+" https://dashboard.example.com https://*.renderer.freelens.app:* http://localhost:4466\n\t}\n"+toCluster) +
		site("http://:"+portChoice, k8s, "\ttailscale_impersonate {\n\t\toptional_groups "+masters()+" c ops\n\t\trecord_groups "+masters()+"\n\t}\n"+toCluster) +
		site("http://:"+portChoiceAuthorize, k8s, "\ttailscale_impersonate {\n\t\tclient_impersonation authorize\n\t\toptional_groups "+masters()+" c\n\t}\n"+toCluster) +
		site("http://:"+portChoiceLimits, k8s, "\ttailscale_impersonate {\n\t\taudit\n\t\twhoami\n\t\toptional_groups c tailnet-readers\n\t\tread_only_group c\n\t\tdeny_groups a\n\t\trequire_groups\n\t\tuser_prefix tailnet:\n\t\tgroup_prefix tailnet:\n\t}\n"+toCluster) +
		site("http://:"+portAgents, k8s, exampleRules("agents")+toCluster) +
		site("https://"+secondNode+"."+lab.Domain+":"+portSecondNode, "tailscale/"+secondNode, "\ttls internal\n\ttailscale_impersonate {\n\t\twhoami\n\t\trequire_groups\n\t}\n"+toCluster) +
		site("http://:"+portForeignNode, "tailscale/"+foreignNode, "\ttailscale_impersonate {\n\t\twhoami\n\t}\n"+toPlain) +
		site("http://:"+portMixed, k8s+" 127.0.0.1", impersonate+toPlain)
}

// exampleRules returns the part of an example between bind and reverse_proxy.
func exampleRules(name string) string {
	root, err := lab.Root()
	if err != nil {
		panic(err)
	}
	content, err := os.ReadFile(filepath.Join(root, "examples", name+".caddyfile"))
	if err != nil {
		panic(err)
	}
	_, rest, found := strings.Cut(string(content), "\tbind ")
	_, rest, _ = strings.Cut(rest, "\n")
	rules, _, more := strings.Cut(rest, "\treverse_proxy ")
	if !found || !more {
		panic("example " + name + " has no bind, or no reverse_proxy after it")
	}
	return rules
}

// secondKey returns the auth key of Caddy's second node.
func secondKey(l *lab.Lab) string {
	secondKeyOnce.Do(func() {
		key, err := l.Headscale.TagKey(context.Background(), "tag:k8s-second")
		if err != nil {
			panic(err)
		}
		secondKeyValue = key
	})
	return secondKeyValue
}

var (
	secondKeyOnce  sync.Once
	secondKeyValue string
)

// testPolicy returns the examples' policy file with all ports open, and with grants
// for the rows of the mapping table that the examples lack.
func testPolicy(example []byte) ([]byte, error) {
	standard, err := hujson.Standardize(example)
	if err != nil {
		return nil, err
	}
	var policy map[string]any
	if err := json.Unmarshal(standard, &policy); err != nil {
		return nil, err
	}
	grant := func(src string, dst string, groups ...string) map[string]any {
		return map[string]any{
			"src": []string{src}, "dst": []string{dst},
			"app": map[string]any{"tailscale.com/cap/kubernetes": []any{
				map[string]any{"impersonate": map[string]any{"groups": groups}},
			}},
		}
	}
	owners := policy["tagOwners"].(map[string]any)
	for _, tag := range []string{"tag:k8s-second", "tag:k8s-ops"} {
		owners[tag] = []string{"group:prod"}
	}
	policy["grants"] = append(policy["grants"].([]any),
		map[string]any{
			"src": []string{"autogroup:member", "tag:k8s-readers", "tag:k8s-ops"},
			"dst": []string{"tag:k8s", "tag:k8s-second"},
			"ip":  []string{"*"},
		},
		grant("erin@example.com", "tag:k8s", "b", "a"),
		grant("erin@example.com", "tag:k8s", "a", "c"),
		grant("tag:k8s-ops", "tag:k8s", "ops"),
		grant("bob@example.com", "tag:k8s-second", "second-readers"),
	)
	changed, err := json.Marshal(policy)
	if err != nil {
		return nil, err
	}
	if changed, err = sessionrecorder.Admit(changed); err != nil {
		return nil, err
	}
	return bytes.ReplaceAll(changed, []byte(`"system:masters"`), []byte(strconv.Quote(masters()))), nil
}

func freePort() string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	defer ln.Close()
	_, port, err := net.SplitHostPort(ln.Addr().String())
	if err != nil {
		panic(err)
	}
	return port
}

// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
)

// forged is an address that no caller has, for headers that name an address.
const forged = "192.0.2.66"

// generated is how many random attacks are added where they complement the listed
// ones. They are the same in every run.
const generated = 150

// behind is a second request, smuggled behind or inside of another one.
const behind = "GET %s/second HTTP/1.1\r\nHost: %h\r\nImpersonate-User: system:admin\r\nAuthorization: Bearer stolen\r\n\r\n"

// identityHeaders are headers that an attacker may try to set or to have removed.
var identityHeaders = []string{
	"Impersonate-User", "Impersonate-Group", "Impersonate-Uid", "Impersonate-Extra-Scopes", "Impersonate-Something-New", "Authorization",
}

// attacks returns all attacks.
func attacks() []attack {
	random := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // every run needs the same attacks
	var tried []attack
	add := func(pitfall string, a attack) {
		a.pitfall = pitfall
		tried = append(tried, a)
	}
	lines := func(pairs ...string) (fields []field) {
		for pair := range slices.Chunk(pairs, 2) {
			fields = append(fields, field{pair[0], pair[1]})
		}
		return fields
	}
	upgrades := [][]field{nil, lines("Upgrade", " websocket", "Sec-WebSocket-Key", " AAAAAAAAAAAAAAAAAAAAAA==", "Sec-WebSocket-Version", " 13"), lines("Upgrade", " SPDY/3.1")}

	const connection = "1"
	for _, upgrade := range upgrades {
		for _, name := range identityHeaders {
			for _, spelled := range spellings(name) {
				value := " " + spelled
				if upgrade != nil {
					value += ", Upgrade"
				}
				add(connection, attack{fields: append(lines("Connection", value), upgrade...)})
			}
		}
		add(connection, attack{fields: append(lines("Connection", " Impersonate-User", "Connection", " Impersonate-Group", "Connection", " Upgrade"), upgrade...)})
		add(connection, attack{fields: append(lines("connection", " upgrade ,\tImpersonate-User\t,,Impersonate-Group;q=1"), upgrade...)})
	}
	for range generated {
		var fields []field
		for range 1 + random.IntN(3) {
			var names []string
			for range 1 + random.IntN(4) {
				names = append(names, pick(random, spellings(pick(random, append(identityHeaders, "Upgrade", "Keep-Alive", "Close", "")))))
			}
			separator := pick(random, []string{",", ", ", " ,", "\t,\t", ",,"})
			fields = append(fields, field{pick(random, spellings("Connection")), pick(random, []string{"", " ", "\t"}) + strings.Join(names, separator)})
		}
		add(connection, attack{fields: append(fields, pick(random, upgrades)...)})
	}

	const prefix = "4"
	for _, name := range append(identityHeaders, "Impersonate-", "Impersonate-Userinfo", "Impersonate-Extra-") {
		for _, spelled := range spellings(name) {
			add(prefix, attack{fields: lines(spelled, " system:masters")})
		}
	}

	const added = "5"
	for _, n := range []int{1, 2, 5} {
		var fields []field
		for range n {
			fields = append(fields, field{"Impersonate-Group", " system:masters"})
		}
		add(added, attack{fields: fields})
		add(added, attack{fields: append(fields, field{"Impersonate-User", " system:admin"})})
		add(added, attack{method: "POST", body: "{}", fields: append(fields, field{"Connection", " Impersonate-Group"})})
	}

	const extra = "6"
	for _, key := range []string{"scopes", "SCOPES", "a%2Fb", "a.b", "a_b", "example.com%2fscopes", "%00", "a%0d%0aImpersonate-User"} {
		add(extra, attack{fields: lines("Impersonate-Extra-"+key, " x")})
	}

	const values = "7"
	for _, value := range []string{
		"a\rImpersonate-Group: system:masters", "a\nImpersonate-Group: system:masters", "a\r\n Impersonate-Group: system:masters",
		"a\x00b", " \t system:admin \t ", "a,system:masters", "sýstem:admin", "", "a\x7fb",
	} {
		for _, name := range []string{"Impersonate-User", "Impersonate-Group", "X-Any"} {
			add(values, attack{fields: lines(name, " "+value), only: http1})
		}
		add(values, attack{fields: lines("impersonate-user", value), only: http2})
		add(values, attack{fields: lines("x-any", value), only: http2})
	}
	add(values, attack{fields: lines("Impersonate-User ", " system:admin"), only: http1})
	add(values, attack{fields: lines(" Impersonate-User", " system:admin"), only: http1})

	const aliases = "8"
	for _, name := range identityHeaders {
		for _, alias := range []string{strings.ReplaceAll(name, "-", "_"), strings.ReplaceAll(name, "-", "."), strings.Replace(name, "-", "_", 1)} {
			for _, spelled := range spellings(alias) {
				add(aliases, attack{fields: lines(spelled, " system:masters")})
			}
		}
	}

	const frontProxy = "9"
	for _, name := range []string{"X-Remote-User", "X-Remote-Group", "X-Remote-Extra-Scopes", "X_Remote_User", "X.Remote.Group"} {
		for _, spelled := range spellings(name) {
			add(frontProxy, attack{fields: lines(spelled, " system:masters")})
		}
	}

	const credentials = "10"
	for _, spelled := range spellings("Authorization") {
		add(credentials, attack{fields: lines(spelled, " Bearer stolen")})
		add(credentials, attack{fields: lines(spelled, " Basic c3RvbGVuOnN0b2xlbg==", spelled, " Bearer stolen")})
	}
	const bearer = "base64url.bearer.authorization.k8s.io.c3RvbGVu"
	for _, protocols := range []string{bearer, "v4.channel.k8s.io, " + bearer, bearer + ",v5.channel.k8s.io", "a," + strings.ToUpper(bearer) + ",b"} {
		for _, spelled := range spellings("Sec-WebSocket-Protocol") {
			add(credentials, attack{fields: append(lines(spelled, " "+protocols, "Connection", " Upgrade"), upgrades[1]...)})
		}
	}

	const forwarding = "11"
	for _, name := range []string{"X-Forwarded-For", "X-Real-Ip", "X_Forwarded_For", "X-Forwarded-Host", "Audit-Id"} {
		for _, spelled := range spellings(name) {
			add(forwarding, attack{fields: lines(spelled, " "+forged)})
		}
	}
	add(forwarding, attack{fields: lines("Forwarded", " for="+forged, "X-Forwarded-For", " "+forged+", "+forged)})
	add(forwarding, attack{fields: lines("X-Forwarded-For", " "+forged, "Connection", " X-Forwarded-For")})

	const placeholders = "12"
	for _, placeholder := range []string{"{env.HOME}", "{http.auth.user.id}", "{http.request.header.Authorization}", "{file./etc/hostname}"} {
		unexpanded := func(r *http.Request) string {
			if got := r.Header.Get("X-Any"); got != placeholder {
				return fmt.Sprintf("X-Any: %q arrived; want %q", got, placeholder)
			}
			return ""
		}
		add(placeholders, attack{fields: lines("X-Any", " "+placeholder, "Connection", " Impersonate-User"), arrives: unexpanded})
		add(placeholders, attack{path: "/" + placeholder, fields: lines("X-Any", " "+placeholder, "Accept", " "+placeholder), arrives: unexpanded})
	}

	const framing = "13"
	add(framing, attack{method: "POST", trailer: true, fields: lines("Trailer", " Impersonate-User, Authorization"), only: http1,
		body: "2\r\n{}\r\n0\r\nImpersonate-User: system:admin\r\nAuthorization: Bearer stolen\r\n\r\n"})
	add(framing, attack{method: "POST", body: "{}", fields: lines("Expect", " 100-continue", "Connection", " Impersonate-User, Expect"), only: http1})
	for _, target := range []string{"http://%h%s", "https://%h%s", "http://other.example%s", "//other.example%s"} {
		add(framing, attack{target: target, fields: lines("Connection", " Impersonate-User"), only: http1})
	}
	add(framing, attack{fields: lines("Host", " other.example"), only: http1, refused: true})
	add(framing, attack{method: "POST", fields: lines("Content-Length", " 0", "Transfer-Encoding", " chunked", "Connection", " Impersonate-User"), body: "0\r\n\r\n", only: http1})
	// A second request in the body of the first, for servers that count bytes differently.
	for _, name := range []string{"Transfer-Encoding", "Transfer-Encoding ", "transfer_encoding", "X-Any"} {
		for _, coding := range []string{" chunked", " xchunked", "\tchunked", " identity, chunked", " chunked, identity"} {
			add(framing, attack{method: "POST", fields: lines(name, coding), body: "0\r\n\r\n" + behind, only: http1})
		}
	}
	add(framing, attack{method: "POST", fields: lines("Content-Length", " 0"), body: behind, only: http1})
	for _, name := range []string{"content-length", "transfer-encoding", "connection", "upgrade", "host", "keep-alive", "proxy-connection"} {
		for _, value := range []string{"0", "chunked", "impersonate-user", "other.example"} {
			add(framing, attack{method: "POST", fields: lines(name, value), body: behind, only: http2})
		}
	}
	for _, trailers := range [][]field{lines("impersonate-user", "system:admin"), lines("impersonate-group", "system:masters", "authorization", "Bearer stolen")} {
		add(framing, attack{method: "POST", fields: lines("trailer", trailers[0].name), body: "{}", trailers: trailers, only: http2})
		add(framing, attack{method: "POST", body: "{}", trailers: trailers, only: http2})
	}
	for _, pseudo := range []string{":path", ":authority", ":scheme", ":method"} {
		add(framing, attack{fields: lines(pseudo, "x"), only: http2})
	}
	for _, target := range []string{"%s HTTP/1.1\r\nImpersonate-User: system:admin\r\nX-Any: ", "%s\r\n\r\n" + behind, "http://other.example%s", "*"} {
		add(framing, attack{target: target, only: http2})
	}
	add(framing, attack{fields: lines("te", "trailers", "trailer", "impersonate-user"), only: http2})
	add(framing, attack{fields: lines("Impersonate-User", "system:admin", "impersonate-user", "system:admin"), only: http2})

	const proxied = "16"
	for _, preface := range []string{
		"PROXY TCP4 " + forged + " " + forged + " 40000 80\r\n", "PROXY UNKNOWN\r\n",
		"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\xc0\x00\x02\x42\xc0\x00\x02\x42\x9c\x40\x00\x50",
	} {
		add(proxied, attack{preface: preface, only: http1})
	}

	const pages = "20a"
	for _, method := range []string{"GET", "POST"} {
		for _, origin := range []string{"https://evil.example", "null", ""} {
			add(pages, attack{method: method, fields: lines("Origin", " "+origin), refused: true})
		}
		for _, origin := range []string{"https://evil.example", "null", "", "http://localhost:8080", "https://%h", "http://%h"} {
			add(pages, attack{method: method, fields: lines("Origin", " "+origin, "User-Agent", " Mozilla/5.0"), refused: true})
		}
		for _, site := range []string{"cross-site", "same-site", "same-origin", "nonsense"} {
			add(pages, attack{method: method, fields: lines("Sec-Fetch-Site", " "+site), refused: true})
		}
		add(pages, attack{method: method, fields: append(lines("Origin", " https://evil.example", "Connection", " Upgrade"), upgrades[1]...), refused: true})
	}

	for _, host := range []string{"rebound.example", "localhost", "127.0.0.1", forged, "%h.rebound.example", "x.%h", "%h@rebound.example", "rebound.example#%h", "", "[::1]"} {
		add(pages, attack{host: &host, refusedPlain: true, only: http1})
		add(pages, attack{method: "POST", body: "{}", host: &host, fields: lines("Content-Type", " text/plain"), refusedPlain: true, only: http1})
	}

	const connect = "20c"
	add(connect, attack{method: "CONNECT", refused: true})
	add(connect, attack{method: "CONNECT", target: "%h", refused: true, only: http1})
	add(connect, attack{method: "CONNECT", fields: lines("connection", " Upgrade", "upgrade", " websocket"), refused: true, only: http1})
	add(connect, attack{method: "CONNECT", fields: lines(":protocol", "websocket"), refused: true, only: http2})

	add(connect, attack{refused: true, only: http3})
	add(connect, attack{method: "CONNECT", refused: true, only: http3})

	const unknown = "21"
	for _, upgrade := range []string{"h2c", "TLS/1.0", "websocket, h2c", "foo", "SPDY/3"} {
		add(unknown, attack{fields: lines("Connection", " Upgrade, Impersonate-User, HTTP2-Settings", "Upgrade", " "+upgrade, "HTTP2-Settings", " AAMAAABkAAQAoAAAAAIAAAAA")})
	}

	// The upstream's answer decides whether the connection stays HTTP. The recorder
	// sees a second request only if it does.
	for _, upgrade := range []string{"websocket", "SPDY/3.1", "h2c"} {
		for _, answer := range []string{"", "/status/200", "/status/302", "/status/400", "/status/403"} {
			for _, second := range []string{"Impersonate-User: system:admin", "Connection: Impersonate-User, Impersonate-Group", "Authorization: Bearer stolen", "X-Any: x"} {
				add(unknown, attack{path: answer, fields: lines("Connection", " Upgrade", "Upgrade", " "+upgrade), behind: "GET %s/second HTTP/1.1\r\nHost: %h\r\n" + second + "\r\n\r\n", only: http1})
			}
		}
	}

	const spelled = "28"
	for _, path := range []string{"/%2e%2e/secrets", "//x", "/./x", "/secrets%2Fname", "/%65xec", "/x/", "/%zz", "/..%2f..%2fapi", "/x;y", "/\\x"} {
		add(spelled, attack{path: path})
		add(spelled, attack{path: path, fields: lines("Connection", " Impersonate-User"), only: http1})
	}

	const mixed = all
	for range generated {
		var fields []field
		for range 1 + random.IntN(5) {
			other := pick(random, tried)
			if !other.refused && !other.refusedPlain && other.only == "" {
				fields = append(fields, other.fields...)
			}
		}
		random.Shuffle(len(fields), func(i, j int) { fields[i], fields[j] = fields[j], fields[i] })
		add(mixed, attack{method: pick(random, []string{"GET", "POST", "DELETE", "PATCH"}), fields: fields})
	}

	// A little less than the megabyte that the documentation lets servers accept.
	const repeated, short = "39", 8 << 10
	raw, long := strings.Repeat("\xff", 1_000_000), strings.Repeat("a", 1_000_000)
	add(repeated, attack{target: "a:" + raw, refused: true, answer: short})
	for _, name := range []string{"Origin", "Sec-Fetch-Site"} {
		add(repeated, attack{fields: lines(name, " "+raw), refused: true, answer: short})
		add(repeated, attack{fields: lines(name, " "+long, "User-Agent", " Mozilla/5.0"), refused: true, answer: short})
	}
	add(repeated, attack{host: &long, refusedPlain: true, answer: short, only: http1})
	add(repeated, attack{fields: lines("Impersonate-User", " "+raw), answer: short})
	add(repeated, attack{fields: lines("Impersonate-"+long, " x"), answer: short})
	add(repeated, attack{fields: lines("Connection", " Upgrade", "Upgrade", " "+raw), answer: short, only: http1})
	return tried
}

// spellings returns a name in several letter cases.
func spellings(name string) []string {
	mixed := []byte(strings.ToLower(name))
	for i := 0; i < len(mixed); i += 2 {
		mixed[i] = strings.ToUpper(string(mixed[i]))[0]
	}
	return []string{name, strings.ToLower(name), strings.ToUpper(name), string(mixed)}
}

func pick[T any](random *rand.Rand, from []T) T { return from[random.IntN(len(from))] }

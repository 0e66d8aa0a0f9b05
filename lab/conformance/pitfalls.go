// SPDX-License-Identifier: Apache-2.0

package conformance

// pitfall is one way in which such proxies have failed.
type pitfall struct {
	// id never changes.
	id, title string
	// tests are the tests that cover what no client request can show, or that look
	// closer: "folder:name". Where Headscale lacks a feature, a comment says what
	// the test uses instead.
	tests []string
}

// pitfalls are all known pitfalls. Attacks cover those without tests.
var pitfalls = []pitfall{
	{id: honestID, title: "honest requests"},
	{id: "1", title: "Connection names identity headers"},
	{id: "2", title: "the config changes the headers again", tests: []string{".:TestHeaderOperations_DoNotChangeIdentity"}},
	{id: "3", title: "an error about identity is ignored", tests: []string{".:TestServeHTTP_NoIdentityIsRefused", "internal/authn:TestAuthenticate_SilentNodeIsUnavailable", "impersonate:TestPeerFrom_RejectsIncompleteAnswers", "impersonate:TestIdentity_RejectsMalformedGrants"}},
	{id: "4", title: "Impersonate-* headers that do not exist yet"},
	{id: "5", title: "the client's groups added to the caller's"},
	{id: "6", title: "extra keys"},
	{id: "7", title: "values that are cut, folded or split", tests: []string{"impersonate:TestIdentity_RejectsUserThatHeadersAlter", "impersonate:TestIdentity_RejectsGroupThatHeadersAlter"}},
	{id: "8", title: "underscores and dots for hyphens"},
	{id: "9", title: "X-Remote-*"},
	{id: "10", title: "the client's own credentials"},
	{id: "11", title: "forged client addresses"},
	{id: "12", title: "placeholders are expanded", tests: []string{".:TestPlaceholders_GroupsAreNotExpanded"}},
	{id: "13", title: "framing, trailers, targets and hosts"},
	{id: "14", title: "a socket of the host"},
	{id: "15", title: "two nodes, or two tailnets", tests: []string{"lab/e2e:TestListener_TwoNodesAskTheOneThatAccepted", "lab/e2e:TestListener_TwoNodesWithSameAddressAreRefused"}},
	{id: "16", title: "the PROXY protocol"},
	{id: "17", title: "IPv6, mapped addresses, Tailscale Services", tests: []string{
		"internal/tailnet:TestConn_MappedAddressesAreUnmapped",
		".:TestServeHTTP_TailscaleServiceIsRefused", // not in Headscale: an injected node
	}},
	{id: "18", title: "nodes shared in from another tailnet", tests: []string{
		"lab/testcontrol:TestSharedNode_TagsAreNoGroups", // not in Headscale: Tailscale's own test control server
		"impersonate:TestIdentity_UserAndGroups",
	}},
	{id: "19", title: "reserved user names", tests: []string{"impersonate:TestIdentity_RejectsUsersOfTheCluster"}},
	{id: "20", title: "Funnel", tests: []string{
		"internal/tailnet:TestConnFrom_FunnelIsRefused", // not in Headscale: the connection type of Funnel's listener
		".:TestServeHTTP_FunnelIsRefused",               // an injected WhoIs
	}},
	{id: "20a", title: "web pages"},
	{id: "20b", title: "the proxy's own node"},
	{id: "20c", title: "CONNECT, HTTP/3"},
	{id: "21", title: "upgrades to anything, requests behind them", tests: []string{"lab/e2e:TestUpgrade_RefusedUpgradeLeavesConnectionToHTTP"}},
	{id: "22", title: "silent streams, slow answers", tests: []string{"lab/e2e:TestLong_SilentStreamsContinue", "lab/e2e:TestLong_LateAnswersArrive"}},
	{id: "23", title: "half-close", tests: []string{"lab/e2e:TestStream_PipeLosesNoByte"}},
	{id: "24", title: "config reloads", tests: []string{"lab/e2e:TestReload_EndsNoStream", "lab/e2e:TestReload_NewConnectionsUseNewestConfig", "lab/e2e:TestReload_WithdrawnGroupHoldsForNewConnections"}},
	{id: "25", title: "buffered watches", tests: []string{".:TestBuffers_WarningIsLoggedOnLoad"}},
	{id: "26", title: "bodies held in memory", tests: []string{"lab/e2e:TestStream_PipeLosesNoByte"}},
	{id: "27", title: "access withdrawn from open sessions", tests: []string{"lab/e2e:TestRevocation_WithdrawnGrantEndsOpenStreams", "lab/e2e:TestRevocation_LeavingDeviceEndsStreams"}},
	{id: "28", title: "paths spelled differently"},
	{id: "32", title: "tokens rotate", tests: []string{"internal/transport:TestToken_Rotation", "lab/e2e:TestOutage_ReplacedTokenFailsNoRequest"}},
	{id: "33", title: "a token that cannot be read", tests: []string{"internal/transport:TestToken_MissingRefusesRequests"}},
	{id: "34", title: "health checks have no caller", tests: []string{"internal/transport:TestHealthCheck_HasNoCredentials", "internal/transport:TestHealthCheck_IsNeverReceived"}},
	{id: "35", title: "a certificate beside a token", tests: []string{"internal/transport:TestKubeconfig_Errors", "internal/transport:TestCredentialsClient_SendsNoneOfTheProxys"}},
	{id: "36", title: "a reverse_proxy without the handler", tests: []string{".:TestRoutes_NestedReverseProxySendsIdentity", ".:TestRoutes_ProxyWithoutHandlerSendsNothing"}},
	{id: "37", title: "answers that are not read", tests: []string{"internal/transport:TestTransport_BoundsUnreadAnswers", "lab/e2e:TestLong_UnreadAnswersAreBounded"}},
	{id: "38", title: "thousands of header fields", tests: []string{".:TestQuota_NothingStaysCounted", "lab/e2e:TestLong_HeaderFieldsAreBounded"}},
	{id: "39", title: "megabytes that are answered, logged or reviewed", tests: []string{".:TestWritten_MegabytesAreNotRepeated"}},
	{id: "42", title: "frames that are never finished", tests: []string{"internal/sessionrecording:TestSPDY_RejectsInvalidFrames", "lab/e2e:TestLong_FramesAreBounded"}},
	{id: "43", title: "refusals that tell about the host", tests: []string{"internal/apistatus:TestBecause_CauseIsNotAnswered", "internal/transport:TestToken_MissingRefusesRequests"}},
	{id: "45", title: "grants that look right and are not", tests: []string{"impersonate:TestGrant_ProblemsAreNamed", "impersonate:TestGrant_MisspeltLeavesOutTags", "impersonate:TestGrant_RepeatedKeyUndoesNoRecording", "lab/e2e:TestNames_MisspeltGrantGivesNothing"}},
	{id: "46", title: "devices that choose their names", tests: []string{"impersonate:TestLimits_ApplyRejectsNames", "lab/e2e:TestNames_RenamedDeviceKeepsItsID"}},
	{id: all, title: "several of these at once"},
}

// IDs of attacks on several pitfalls at once, and of honest requests.
const (
	all      = "*"
	honestID = "0"
)
